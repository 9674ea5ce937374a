"""Turn an error into one line and an exit code (`manual.EXIT_CODES`). This ends the program, and each rank of a run."""

import os
import sys
import time
from collections.abc import Callable

from simclr_dist.run.status import End, end_of, leave_note
from simclr_dist.system import signals
from simclr_dist.system.errors import (
    LAST_WORD,
    PREEMPTED,
    DivergedError,
    RankError,
    SaveError,
    StoppedError,
    UserError,
    WorkerError,
    is_of_disk,
    say,
)

_UNTIL_KILLED = 60.0  # seconds; the launcher ends all ranks before


def exit_code(work: Callable[[], int], *, is_rank: bool = True) -> int:
    """Run `work` and return its exit code. After an error, return the code of that error.

    The user gets one line about an error: from the rank that alone has seen it, else from rank 0. What is no rank speaks
    whatever RANK says. torchrun reports any code but 0 at length, as a crash. So it gets 0 where our launcher has a note; and
    without a launcher from all but rank 0, where these ranks are all.
    """
    alone = False
    try:
        code = work()
        leave_note(End("failed" if code else "done", code))
    except StoppedError as stopped:
        _say_on_rank_0(f"stopped by {stopped}: everything is saved, and the same command goes on")
        # Any other code makes torchrun start the ranks again, or report a failure; status.json has the truth.
        return 0 if under_torchrun() else PREEMPTED
    except UserError as error:
        code, alone = refused(error, is_rank=is_rank), isinstance(error, RankError)
        if code == 1:  # a PassingError: torchrun is to end the others, for all to start again
            return code
    except (DivergedError, SaveError) as error:
        cure = "what was saved before is whole, and once it can be written the same command goes on"
        _say_on_rank_0(f"{error}; {cure}" if isinstance(error, SaveError) else f"diverged: {error}")
        code = leave_note(end_of(error))
    except WorkerError as error:
        say(str(error))
        return leave_note(end_of(error))
    except Exception as error:  # a crash leaves its note, and its traceback unless a disk is at fault
        code, alone = leave_note(end_of(error)), True
        if not is_of_disk(error) or not isinstance(error, OSError) or error.filename is None:
            raise
        say(f"{error.filename}: {error.strerror}")
    if not code or not _is_reported() or (alone and LAST_WORD not in os.environ):
        return code
    if LAST_WORD in os.environ:
        time.sleep(_UNTIL_KILLED * alone)  # else the others would speak of a lost connection
        return 0
    time.sleep(_speaks())  # what torchrun has to end it reports too
    return code * _speaks()


def refused(error: UserError, *, is_rank: bool = True) -> int:
    """Print the user's mistake and leave a note; return the exit code. Rank 0 prints, and a rank with a RankError."""
    if not is_rank or _speaks() or isinstance(error, RankError):
        say(str(error))
    elif not _is_reported():
        time.sleep(1)  # srun, say, ends the other ranks once one has failed: let rank 0 speak first
    return leave_note(end_of(error))


def under_torchrun() -> bool:
    """Tell whether torchrun has started this process as a rank."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _is_reported() -> bool:
    """Tell whether torchrun may miss this rank's failure. Our launcher has a note of it, or rank 0 ends on this machine too."""
    return under_torchrun() and (LAST_WORD in os.environ or os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"))


def leave_with(code: int) -> int:
    """Return the exit code on the way out. A late stop signal, or lines that a full disk refused (120), do not change it."""
    signals.ignore()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


def _speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _say_on_rank_0(line: str) -> None:
    if _speaks():
        say(line)
