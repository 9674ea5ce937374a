"""What a user did wrong, as one line: every message names the file and key, the value, and the cure."""


class UserError(Exception):
    """Ends a command with one line and exit code 2; never with a traceback."""


class ConfigError(UserError):
    """A setting that is unknown, of the wrong type, out of range, or in conflict with another."""


class DataError(UserError):
    """Images, shards, a manifest, a checkpoint or an encoder file that cannot be used as they are."""


class RankError(DataError):
    """A DataError that only the rank which raises it has seen, so that rank says it (others are said by rank 0)."""


class DivergedError(Exception):
    """Too many non-finite steps in a row; ends a run with exit code 3."""
