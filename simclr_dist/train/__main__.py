"""`torchrun -m simclr_dist.train CONFIG [--profile STEPS] [--key value]`, or `python -m` for one process."""

import contextlib
import errno
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from simclr_dist.config.load import load_config
from simclr_dist.system import signals
from simclr_dist.system.errors import (
    LAST_WORD,
    PREEMPTED,
    ConfigError,
    DivergedError,
    RankError,
    SaveError,
    StoppedError,
    UserError,
)
from simclr_dist.train.profiling import take_profile

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def main(argv: Sequence[str]) -> int:
    """`CONFIG [--profile STEPS [--profile-rank R]] [--key value]`; returns the exit code."""
    signals.listen()
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if under_torchrun:
        signals.die_with(os.getppid())  # an agent that was killed leaves its ranks, with their GPUs, behind
    speaks = os.environ.get("RANK", "0") == "0"

    def say(line: str) -> None:
        if speaks:
            print(f"simclr-dist: {line}", file=sys.stderr, flush=True)

    try:
        if not argv or argv[0].startswith("-"):
            raise ConfigError("usage: python -m simclr_dist.train CONFIG [--key value ...]")
        profile, overrides = take_profile(argv[1:])
        config = load_config(argv[0], overrides)
        if not under_torchrun:  # whose other ranks would wait for this one
            if signals.asked():
                raise StoppedError(f"{signals.name(signals.asked())} before the first step")
            signals.leave_at_once(PREEMPTED, "simclr-dist: stopped by {signal} before the first step; the same command goes on")
        from simclr_dist.method.distributed import world  # torch: seconds
        from simclr_dist.train.loop import train

        signals.listen()
        with world(config.device, config.first_step_timeout_minutes) as here:
            train(config, here, profile)
    except UserError as error:
        if speaks or isinstance(error, RankError):
            print(f"simclr-dist: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(1)  # torchrun ends the other ranks once one has exited: let rank 0 speak first
        return _final(2)
    except DivergedError as error:
        say(f"diverged: {error}")
        return _final(3)
    except StoppedError as stopped:
        say(f"stopped by {stopped}: everything is saved, and the same command goes on")
        # Any other code makes torchrun start the ranks again, or report a failure; status.json has the truth.
        return 0 if under_torchrun else PREEMPTED
    except SaveError as error:
        _note_crash(error)
        say(f"{error}; the checkpoints before are whole, and once it can be written the same command goes on")
        return 1
    except OSError as error:
        _note_crash(error)
        if error.errno not in _DISK or error.filename is None:
            raise
        print(f"simclr-dist: {error.filename}: {error.strerror}", file=sys.stderr, flush=True)
        return 1
    except Exception as error:
        _note_crash(error)
        raise
    return 0


def _final(code: int) -> int:
    """A code after which a start would only repeat it; the launcher, if there is one, is told."""
    if path := os.environ.get(LAST_WORD):
        Path(path).write_text(str(code))
    return code


def _note_crash(error: Exception) -> None:
    """For the launcher: what this rank died of, beside what others will say of the connection that they lose with it."""
    if path := os.environ.get(LAST_WORD):
        note = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        with contextlib.suppress(OSError):  # of a full disk, say, which is the error itself then
            Path(f"{path}.{os.environ.get('RANK', '0')}").write_text(note, encoding="utf-8", errors="replace")


def _leave_with(code: int) -> int:
    """Keep the exit code on the way out from a late stop signal, and from lines that a full disk did not take (120)."""
    signals.on_the_way_out()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


if __name__ == "__main__":
    sys.exit(_leave_with(main(sys.argv[1:])))
