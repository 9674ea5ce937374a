"""Define the errors that end a command, and show them.

Exit codes: 0 done, 1 crash, 2 `UserError`, 3 `DivergedError`, 75 stopped on request with nothing lost (sysexits' EX_TEMPFAIL).
"""

import errno
import re
import reprlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from simclr_dist.system import progress

PREEMPTED = 75
LAYOUT = "\n\t"  # what text of several lines keeps, when what it has from files must not reach a terminal as it is
# Variable with the path, less `.RANK`, of the note that a rank leaves for its launcher: torchrun loses exit codes.
LAST_WORD = "SIMCLR_DIST_LAST_WORD"

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
_HALF = 1000  # characters of an error's line: it begins with file and key, and ends with the cure


class UserError(Exception):
    """A user's mistake. One line with key, value and cure; exit code 2. The middle of a very long one is left out."""

    def __init__(self, line: str) -> None:
        super().__init__(both_ends(line, _HALF))


class ConfigError(UserError):
    """Refused setting: unknown, of wrong type, out of range, or contradicting another."""


class DataError(UserError):
    """Images, shards, a checkpoint or an encoder file cannot be used."""


class DamagedError(DataError):
    """A file that this program wrote is not what it was."""


class UnreachableError(DataError):
    """A server or its cache keeps failing. No image is replaced for it."""


class RankError(DataError):
    """Error seen by one rank only; that rank reports it."""


class PassingError(RankError):
    """State of one machine that may pass, like a port in use. Inside a SLURM job it is a crash: another start follows."""


class TakenOverError(UserError):
    """A later start holds the run folder. This one must write nothing more."""


class OutputError(UserError):
    """Standard output cannot be written, as on a full disk."""


class SaveError(Exception):
    """A file of the run cannot be written. Earlier checkpoints are whole. `more` ends the line."""

    def __init__(self, path: object, cause: OSError, more: str = "") -> None:
        super().__init__(path, cause, more)  # as they are: the error goes to the other ranks by pickle
        self.path, self.cause, self.more = path, cause, more

    def __str__(self) -> str:
        return f"{self.path}: cannot be written: {reason_of(self.cause)}{self.more}"


class CrashedError(Exception):
    """The ranks that a program has started crashed. Exit code 1."""


class StoppedError(Exception):
    """The run has saved its work after a stop signal. Exit code 75."""


class LostRankError(Exception):
    """A rank has ended, hangs, or never came. The others crash because of it."""


class WorkerError(Exception):
    """A reading process has died, or sends nothing."""


class RanksDifferError(Exception):
    """Ranks hold different numbers. Memory or arithmetic of one is at fault."""


class DivergedError(Exception):
    """Too many non-finite steps in a row; exit code 3."""


def both_ends(text: str, half: int) -> str:
    """Leave the middle out of a text of more than two halves."""
    return text if len(text) <= 2 * half else f"{text[:half]} ... {text[-half:]}"


def reason_of(error: object) -> str:
    """Return an error's text in one line, or its type."""
    strerror = getattr(error, "strerror", None)
    return str(strerror or (str(error).splitlines() or [""])[0] or type(error).__name__)


@contextmanager
def refusing(line: str, kind: type[UserError] = DataError, cure: str = "") -> Iterator[None]:
    """Turn an OSError of the block into an error of ours. Its reason stands between `line` and `cure`."""
    try:
        yield
    except OSError as error:
        raise kind(f"{line}: {reason_of(error)}{cure}") from None


def is_of_disk(error: BaseException | None) -> bool:
    """Tell whether a disk is full, read-only or forbidden. It stays so until somebody mends it."""
    cause = error.cause if isinstance(error, SaveError) else error
    return isinstance(cause, OSError) and cause.errno in _DISK


def crash_summary(error: BaseException) -> str:
    """Return an error's type and text in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def say(line: str, before: str = "simclr-dist: ") -> None:
    """Print a line on standard error. It is lost where nothing can be written, as on a terminal that has gone."""
    progress.clear()
    with suppress(OSError):
        print(f"{before}{printable(line, keep=LAYOUT)}", file=sys.stderr, flush=True)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
shown = _SHORT.repr
"""Write a value for an error's line, as repr does. Much of a large one is left out."""


def printable(text: str, keep: str = "") -> str:
    """Escape what cannot be printed, but for `keep`. Line ends, a terminal's commands, and bytes that are no text."""

    def escaped(character: re.Match[str]) -> str:
        c = character[0]
        return c if c in keep or c.isprintable() else c.encode("unicode_escape").decode()

    return re.sub("[^ -~]", escaped, text)  # most are plain, also in a log of gigabytes


# All up to the last @ of the host's part. If what should be a port is no number, up to the last @ of all: then a password holds
# a / ? or #.
_LOGIN = re.compile(r"://(?:[^/?#]*@|[^/?#\[]*:(?!\d{1,5}(?:[/?#]|$)).*@)", re.DOTALL)
_REST = re.compile(r"(://[^?#]*#|\?).*", re.DOTALL)


def redact(url: str) -> str:
    """Hide what may be secret in a URL: user, password, query, fragment.

    In doubt it hides too much. Only a password that begins like a port, `80/...`, cannot be told from a port.
    """
    return _REST.sub(r"\1***", _LOGIN.sub("://***@", url))
