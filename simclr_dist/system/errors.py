"""How a command ends when it does not end well. A user's mistake is one line that names file and key, value, and cure.

Exit codes: 0 done, 1 crash, 2 `UserError`, 3 `DivergedError`, 75 stopped on request with nothing lost (sysexits' EX_TEMPFAIL).
"""

import re

PREEMPTED = 75
LAST_WORD = (
    "SIMCLR_DIST_LAST_WORD"  # variable with the file in which a rank tells its launcher a final code, which torchrun loses
)


class UserError(Exception):
    """Ends a command with one line and exit code 2; never with a traceback."""


class ConfigError(UserError):
    """A setting that is unknown, of the wrong type, out of range, or in conflict with another."""


class DataError(UserError):
    """Images, shards, a manifest, a checkpoint or an encoder file that cannot be used as they are."""


class UnreachableError(DataError):
    """A server, or the cache before it, that fails for long: no fault of an image, so none is replaced because of it."""


class RankError(DataError):
    """A DataError that only the rank which raises it has seen, so that rank says it (others are said by rank 0)."""


class TakenOverError(UserError):
    """A later start has taken the run folder over: this one, cut off or left behind, must write nothing more."""


class OutputError(UserError):
    """Standard output that cannot be written, on a full disk for one."""


class SaveError(Exception):
    """A checkpoint, or the run folder, cannot be written; the checkpoints before are whole. One line with path and reason."""


class StoppedError(Exception):
    """The run was asked to stop, and has saved all that it did; ends it with exit code 75."""


class RanksDifferError(Exception):
    """Ranks that must hold the same numbers do not: memory or arithmetic of one of them is at fault; a crash."""


class DivergedError(Exception):
    """Too many non-finite steps in a row; ends a run with exit code 3."""


def printable(name: str) -> str:
    """The name in one printable line: file names may hold line ends and bytes that are no text."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


# All up to the last @ of the host's part; or to the last of all, where what should be a port is no number: a password with
# a / ? or # in it.
_LOGIN = re.compile(r"://(?:[^/?#]*@|[^/?#\[]*:(?!\d{1,5}(?:[/?#]|$)).*@)", re.DOTALL)
_REST = re.compile(r"(://[^?#]*#|\?).*", re.DOTALL)


def redact(url: str) -> str:
    """The URL without what may be a secret in it: user, password, query, fragment.

    In doubt too much goes; only a password that begins like a port, `80/...`, cannot be told from one.
    """
    return _REST.sub(r"\1***", _LOGIN.sub("://***@", url))
