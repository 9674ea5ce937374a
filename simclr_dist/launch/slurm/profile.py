"""What a job asks of SLURM, and how it starts there: a frozen dataclass, filled from a strict YAML file."""

import dataclasses
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from simclr_dist.config.strict_yaml import merge, read_yaml, suggest
from simclr_dist.system.errors import ConfigError

# sbatch's options that a key of ours sets, and those that the job's life depends on: not for `extra`.
_OUR_KEY = {
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "nodes": "nodes",
    "gpus-per-node": "gpus_per_node",
    "ntasks-per-node": "tasks_per_node",
    "cpus-per-task": "cpus_per_task",
    "time": "time",
    "mem": "memory_gb",
    "constraint": "constraint",
    "exclude": "exclude",
    "reservation": "reservation",
    "mail-user": "mail_user",
    "mail-type": "mail_type",
    "signal": "stop_seconds",
    "export": "environment",
}
_FIXED = frozenset(
    {
        *("array", "chdir", "dependency", "error", "export-file", "input", "job-name", "kill-on-invalid-dep", "no-requeue"),
        *("ntasks", "open-mode", "output", "parsable", "requeue", "test-only", "wait", "wrap"),
    }
)
_MAIL_TYPES = frozenset(
    {
        *("NONE", "BEGIN", "END", "FAIL", "REQUEUE", "ALL", "INVALID_DEPEND", "STAGE_OUT"),
        *("TIME_LIMIT", "TIME_LIMIT_90", "TIME_LIMIT_80", "TIME_LIMIT_50"),
    }
)


@dataclass(frozen=True)
class Profile:
    """A cluster, or a part of one; what is None is left to SLURM."""

    partition: str | None = None
    """Partition, or several with commas between them."""
    account: str | None = None
    """Account that pays."""
    qos: str | None = None
    """Quality of service."""
    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 8
    """GPUs of each; 0 for ranks on CPUs."""
    tasks_per_node: int | None = None
    """Ranks of each machine; None: one a GPU, or one where there is none."""
    cpus_per_task: int | None = None
    """CPU cores of a rank, its reading processes among them."""
    time: str = "1-00:00:00"
    """Time limit of one start: DAYS-HOURS:MINUTES:SECONDS, HOURS:MINUTES:SECONDS or minutes. The job goes on in the next."""
    memory_gb: float | None = None
    """Memory of each machine in GiB; 0: all that it has."""
    constraint: str | None = None
    """Features that a machine must have, like a100&ib."""
    exclude: str | None = None
    """Machines not to take."""
    reservation: str | None = None
    """Reservation to run in."""
    container: str | None = None
    """Image to run in."""
    container_runtime: Literal["apptainer", "pyxis"] | None = None
    """What runs the image."""
    container_mounts: tuple[str, ...] = ()
    """More folders to see inside, as FOLDER or FOLDER:INSIDE; run folder and working directory always are."""
    container_python: str = "python3"
    """Python inside the image that has this package."""
    setup: tuple[str, ...] = ()
    """Lines of shell that run on the first machine before the ranks start, like `module load cuda`."""
    mail_user: str | None = None
    """Address for mail."""
    mail_type: str | None = None
    """Events to mail, with commas between them, like END,FAIL."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of the job, like NCCL_SOCKET_IFNAME."""
    stop_seconds: int = 120
    """How long before the time limit the ranks are told to stop: a step and a checkpoint must fit (SLURM may tell up to 60 s
    earlier)."""
    max_restarts: int = 3
    """Crashed starts in a row without a new checkpoint after which the job starts again; one more ends it."""
    extra: Mapping[str, str | bool] = field(default_factory=dict)
    """More options of sbatch by their long names; true for one without a value."""

    @property
    def tasks(self) -> int:
        """Ranks of one machine."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.nodes * self.tasks

    @property
    def minutes(self) -> int:
        """The time limit in minutes, rounded up."""
        return -(-_seconds(self.time) // 60)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: what submission.json holds, and `profile_from_dict` reads."""
        return dataclasses.asdict(self)


_KEYS = tuple(key.name for key in dataclasses.fields(Profile))


def load_profile(path: str | Path, *, allow_setup: bool = False) -> Profile:
    """Read and check a profile; raises ConfigError with one line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the profile: {getattr(error, 'strerror', None) or error}") from None
    values = read_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    return profile_from_dict(values, str(path), allow_setup=allow_setup)


def profile_from_dict(values: Mapping[str, Any], source: str, *, allow_setup: bool = False) -> Profile:
    """The Profile of plain values; `source` (a file) begins the ConfigError. Without `allow_setup`, set-up lines are refused:
    they are commands, and a profile may have come from anywhere."""
    plain = dict(values)
    collected: dict[str, Any] = {}
    for key in ("setup", "container_mounts"):
        if key in plain:
            collected[key] = _lines(plain.pop(key), f"{source}: {key}")
    for key, read in (("environment", _variable), ("extra", _option)):
        if key in plain:
            collected[key] = _named(plain.pop(key), f"{source}: {key}", read)
    if type(plain.get("time")) is int:
        plain["time"] = str(plain["time"])
    profile: Profile = dataclasses.replace(merge(Profile(), plain, source, known=_KEYS), **collected)
    _check(profile, source)
    if profile.setup and not allow_setup:
        raise ConfigError(f"{source}: setup: {profile.setup[0]!r} is a shell command; if you trust it, add --allow-setup")
    return profile


def check_text(value: str, where: str) -> None:
    """Refuse what could end a line of the batch script, or what sbatch takes out of it."""
    if not value or not value.isprintable() or "\\" in value:
        raise ConfigError(f"{where}: {value!r}: must be one line of text without backslashes, and not empty")


def _lines(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{where}: {value!r} is not a list of lines")
    for line in value:
        if not isinstance(line, str) or not line or not line.isprintable():
            raise ConfigError(f"{where}: {line!r} is not a line of text")
    return tuple(value)


def _named(value: Any, where: str, read: typing.Callable[[str, Any, str], Any]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected settings below it, found {value!r}")
    return {key: read(key, each, f"{where}.{key}") for key, each in value.items()}


def _variable(name: str, value: Any, where: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ConfigError(f"{where}: {name!r} is not a variable's name")
    text = str(value) if type(value) is int else value
    if not isinstance(text, str) or not (text.isprintable()):
        raise ConfigError(f"{where}: {value!r} is not a line of text; put it in quotes")
    return text


def _option(name: str, value: Any, where: str) -> str | bool:
    if not re.fullmatch(r"[a-z][a-z0-9-]+", name):
        raise ConfigError(f"{where}: {name!r} is not a long option of sbatch, like exclusive or gpu-bind")
    if name in _OUR_KEY:
        raise ConfigError(f"{where}: write {_OUR_KEY[name]} instead")
    if name in _FIXED:
        raise ConfigError(f"{where}: is not for a profile to say")
    if value is True:
        return True
    text = str(value) if type(value) is int else value
    if not isinstance(text, str):
        raise ConfigError(f"{where}: {value!r} is neither text nor true; put it in quotes")
    check_text(text, where)
    return text


def _seconds(time: str) -> int:
    """Raises ValueError."""
    if re.fullmatch(r"[0-9]+", time):
        return 60 * int(time)
    found = re.fullmatch(r"(?:([0-9]+)-)?([0-9]{1,3}):([0-9]{2}):([0-9]{2})", time)
    if not found or int(found[3]) > 59 or int(found[4]) > 59:
        raise ValueError(time)
    return int(found[1] or 0) * 86400 + int(found[2]) * 3600 + int(found[3]) * 60 + int(found[4])


def _check(profile: Profile, source: str) -> None:
    def refuse(key: str, why: str) -> typing.NoReturn:
        raise ConfigError(f"{source}: {key}: {getattr(profile, key)!r} {why}")

    for key in _KEYS:
        value = getattr(profile, key)
        if isinstance(value, str):
            check_text(value, f"{source}: {key}")
    at_least = {"nodes": 1, "gpus_per_node": 0, "tasks_per_node": 1, "cpus_per_task": 1, "memory_gb": 0, "max_restarts": 0}
    for key, bound in at_least.items():
        value = getattr(profile, key)
        if value is not None and value < bound:
            refuse(key, f"is too small; the least is {bound}")
    if profile.gpus_per_node and profile.tasks > profile.gpus_per_node:
        refuse("tasks_per_node", f"are more than the {profile.gpus_per_node} gpus_per_node; a rank takes one GPU")
    try:
        seconds = _seconds(profile.time)
    except ValueError:
        refuse("time", "is no time; write 2-00:00:00 for two days, 12:00:00 for twelve hours, or minutes")
    if seconds == 0:
        refuse("time", "is no time at all")
    if not 1 <= profile.stop_seconds <= 65535:
        refuse("stop_seconds", "is out of range; 1 to 65535")
    if profile.stop_seconds >= seconds:
        refuse("stop_seconds", f"is not shorter than the time limit {profile.time}")
    if (profile.container is None) != (profile.container_runtime is None):
        refuse("container_runtime", f"contradicts container: {profile.container!r}; set both, or neither")
    if profile.container_mounts and profile.container is None:
        refuse("container_mounts", "has no effect without container")
    for mount in profile.container_mounts:
        check_text(mount, f"{source}: container_mounts")
        if not mount.startswith("/") or "," in mount:  # both runtimes put commas between mounts
            raise ConfigError(f"{source}: container_mounts: {mount!r} is not /FOLDER or /FOLDER:/INSIDE without commas")
    if profile.mail_user is not None and profile.mail_type is None:
        refuse("mail_user", "has no effect without mail_type, like END,FAIL")
    for event in (profile.mail_type or "NONE").split(","):
        if event not in _MAIL_TYPES:
            refuse("mail_type", f"has an unknown event {event!r}{suggest(event, sorted(_MAIL_TYPES))}")
