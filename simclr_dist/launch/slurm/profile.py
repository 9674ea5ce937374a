"""Read a profile from a strict YAML file. It says what a job asks of SLURM, and how it starts there."""

import dataclasses
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from simclr_dist.config.ranges import Count, Natural, NonNegative, Range, out_of_range
from simclr_dist.config.strict_yaml import merge, read_settings, suggest
from simclr_dist.system.errors import ConfigError

# Options of sbatch that get the value of the key of the same name as it is.
PASSED_ON = ("partition", "account", "qos", "cpus-per-task", "constraint", "exclude", "reservation", "mail-user", "mail-type")
# Options of sbatch (22.05 to 25.05) that only say what a job needs, when, and at which place in the queue.
_RESOURCES = set(re.findall(r"\S+", """
    acctg-freq batch begin cluster-constraint comment consolidate-segments contiguous core-spec cores-per-socket cpu-freq
    cpus-per-gpu deadline delay-boot exclusive extra-node-info gpu-bind gpu-freq gpus gpus-per-socket gpus-per-task gres
    gres-flags hint hold licenses mcs-label mem-bind mem-per-cpu mem-per-gpu mincpus network nice nodelist ntasks-per-core
    ntasks-per-gpu ntasks-per-socket oom-kill-step overcommit oversubscribe power prefer priority profile propagate segment
    sockets-per-node spread-job spread-segments switches thread-spec threads-per-core time-min tmp tres-bind tres-per-task
    use-min-nodes wait-all-nodes wckey
"""))  # fmt: skip
# Those of them that take whole machines, or name several: a job of one rank leaves them out.
_OF_MACHINES = set(re.findall(r"\S+", """
    consolidate-segments core-spec exclusive mincpus nodelist segment spread-segments thread-spec
"""))  # fmt: skip
# Variables that only choose among what is there. Others of the same families load a library, run or write a file:
# NCCL_NET_PLUGIN, OMP_TOOL_LIBRARIES, TORCH_EXTENSIONS_DIR, UCX_MODULE_DIR, FI_PROVIDER_PATH, NCCL_DEBUG_FILE.
_HARMLESS = {
    f"{family}_{name}"
    for family, names in {
        "CUBLAS": "WORKSPACE_CONFIG",
        "CUDA": "DEVICE_MAX_CONNECTIONS DEVICE_ORDER LAUNCH_BLOCKING MODULE_LOADING",
        "FI": """
            CXI_DISABLE_HOST_REGISTER CXI_DEFAULT_CQ_SIZE CXI_RDZV_PROTO CXI_RX_MATCH_MODE EFA_FORK_SAFE EFA_USE_DEVICE_RDMA
            MR_CACHE_MONITOR PROVIDER
        """,
        "GLOO": "SOCKET_IFNAME",
        "GOMP": "CPU_AFFINITY",
        "KMP": "AFFINITY BLOCKTIME",
        "MALLOC": "ARENA_MAX TRIM_THRESHOLD_",
        "MKL": "DYNAMIC NUM_THREADS",
        "NCCL": """
            ALGO ASYNC_ERROR_HANDLING BLOCKING_WAIT BUFFSIZE COLLNET_ENABLE CROSS_NIC CUMEM_ENABLE DEBUG DEBUG_SUBSYS
            DMABUF_ENABLE IB_ADAPTIVE_ROUTING IB_ADDR_FAMILY IB_ADDR_RANGE IB_AR_THRESHOLD IB_CUDA_SUPPORT IB_DISABLE
            IB_GID_INDEX IB_HCA IB_MERGE_NICS IB_PCI_RELAXED_ORDERING IB_PKEY IB_QPS_PER_CONNECTION IB_RETRY_CNT
            IB_ROCE_VERSION_NUM IB_SL IB_SPLIT_DATA_ON_QPS IB_TC IB_TIMEOUT IGNORE_CPU_AFFINITY LAUNCH_MODE MAX_CTAS
            MAX_NCHANNELS MIN_CTAS MIN_NCHANNELS NET_GDR_LEVEL NET_GDR_READ NSOCKS_PERTHREAD NTHREADS NVLS_ENABLE P2P_DISABLE
            P2P_LEVEL PROTO PXN_DISABLE SHM_DISABLE SOCKET_FAMILY SOCKET_IFNAME SOCKET_NTHREADS
        """,
        "NVIDIA": "TF32_OVERRIDE",
        "OMP": """
            DYNAMIC MAX_ACTIVE_LEVELS NUM_THREADS PLACES PROC_BIND SCHEDULE STACKSIZE THREAD_LIMIT WAIT_POLICY
        """,
        "OPENBLAS": "NUM_THREADS",
        "PYTORCH": "ALLOC_CONF CUDA_ALLOC_CONF",
        "TORCH": """
            CPP_LOG_LEVEL DISTRIBUTED_DEBUG NCCL_ASYNC_ERROR_HANDLING NCCL_AVOID_RECORD_STREAMS NCCL_BLOCKING_WAIT
            NCCL_ENABLE_MONITORING NCCL_HEARTBEAT_TIMEOUT_SEC NCCL_TRACE_BUFFER_SIZE SHOW_CPP_STACKTRACES
        """,
        "UCX": "IB_GID_INDEX NET_DEVICES TLS",
    }.items()
    for name in names.split()
}  # fmt: skip
# Never for `extra`: options that a key sets, and those that the job's life depends on.
_KEY_OF = {option: option.replace("-", "_") for option in (*PASSED_ON, "nodes", "gpus-per-node", "time")} | {
    "ntasks-per-node": "tasks_per_node", "mem": "memory_gb", "signal": "stop_seconds", "export": "environment",
}  # fmt: skip
_FIXED = {
    "array", "chdir", "dependency", "error", "export-file", "input", "job-name", "kill-on-invalid-dep", "no-requeue",
    "ntasks", "open-mode", "output", "parsable", "quiet", "requeue", "test-only", "wait", "wrap",
}  # fmt: skip
_MAIL_TYPES = {
    "NONE", "BEGIN", "END", "FAIL", "REQUEUE", "ALL", "INVALID_DEPEND", "STAGE_OUT",
    "TIME_LIMIT", "TIME_LIMIT_90", "TIME_LIMIT_80", "TIME_LIMIT_50",
}  # fmt: skip


@dataclass(frozen=True)
class Profile:
    """A cluster, or a part of one. What is None is left to SLURM."""

    partition: str | None = None
    """Partition, or several with commas between them."""
    account: str | None = None
    """Account that pays."""
    qos: str | None = None
    """Quality of service."""
    nodes: Count = 1
    """Machines."""
    gpus_per_node: Natural = 8
    """GPUs of each; 0 for ranks on CPUs."""
    tasks_per_node: Count | None = None
    """Ranks of each machine; None: one a GPU, or one where there is none."""
    cpus_per_task: Count | None = None
    """CPU cores of a rank, its reading processes among them."""
    time: str = "1-00:00:00"
    """Time limit of one start: DAYS-HOURS:MINUTES:SECONDS, HOURS:MINUTES:SECONDS or minutes. The job goes on in the next."""
    memory_gb: NonNegative | None = None
    """Memory of each machine in GiB; 0: all that it has."""
    constraint: str | None = None
    """Features that a machine must have, like a100&ib."""
    exclude: str | None = None
    """Machines not to take."""
    reservation: str | None = None
    """Reservation to run in."""
    container: str | None = None
    """Image to run in. Its programs run as you, so it needs --allow-setup."""
    container_runtime: Literal["apptainer", "pyxis"] | None = None
    """What runs the image."""
    container_mounts: tuple[str, ...] = ()
    """More folders to see inside, as FOLDER or FOLDER:INSIDE; run folder and working directory always are."""
    container_python: str = "python3"
    """Python inside the image that has this package."""
    setup: tuple[str, ...] = ()
    """Lines of shell that run on the first machine before the ranks start, like `module load cuda`. They need --allow-setup."""
    mail_user: str | None = None
    """Address for mail."""
    mail_type: str | None = None
    """Events to mail, with commas between them, like END,FAIL."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of the job, like NCCL_SOCKET_IFNAME; those that may run a program need --allow-setup."""
    stop_seconds: Annotated[int, Range(least=1, most=65535, meaning="is out of range; 1 to 65535")] = 120
    """How long before the time limit the ranks are told to stop: a step and a checkpoint must fit (SLURM may tell up to 60 s
    earlier)."""
    max_restarts: Natural = 3
    """Crashed starts in a row without a new checkpoint after which the job starts again; one more ends it."""
    extra: Mapping[str, str | bool] = field(default_factory=dict)
    """More options of sbatch by their full names; true for one without a value. Those that ask for more than resources need
    --allow-setup."""

    @property
    def tasks(self) -> int:
        """Return the number of ranks on one machine."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        """Return the number of ranks in all."""
        return self.nodes * self.tasks

    @property
    def minutes(self) -> int:
        """Return the time limit in minutes, rounded up."""
        return -(-_seconds(self.time) // 60)

    @property
    def of_one_rank(self) -> "Profile":
        """Return what a job of one rank asks for. It is a rank's share of a machine; of all its memory, SLURM's share."""
        extra = {name: value for name, value in self.extra.items() if name not in _OF_MACHINES}
        for name, count in (("gpus", r"(^|:)\d+.*"), ("gres", r"(\bgpu(?::[a-z]\w*)?:)\d+")):
            if isinstance(value := extra.get(name), str):
                extra[name] = re.sub(count, r"\g<1>1", value)
        memory = self.memory_gb / self.tasks if self.memory_gb else None
        return dataclasses.replace(
            self, nodes=1, gpus_per_node=min(self.gpus_per_node, 1), tasks_per_node=1, memory_gb=memory, extra=extra
        )


def load_profile(path: str | Path, *, allow_setup: bool = False) -> Profile:
    """Read and check a profile; raises ConfigError with one line."""
    values = read_settings(Path(path), "profile", "write one like those in launch/profiles")
    return profile_from_dict(values, str(path), allow_setup=allow_setup)


def profile_from_dict(values: Mapping[str, Any], source: str, *, allow_setup: bool = False) -> Profile:
    """Make a Profile of plain values, as in submission.json. `source` (a file) begins the ConfigError.

    A profile may have come from anywhere: what may run a program needs `allow_setup`.
    """
    plain = dict(values)
    readers: dict[str, Callable[[Any, str], Any]] = {"setup": _lines, "container_mounts": _lines}
    readers |= {"environment": partial(_named, _variable), "extra": partial(_named, _option)}
    collected = {key: read(plain.pop(key), f"{source}: {key}") for key, read in readers.items() if key in plain}
    if type(plain.get("time")) is int:
        plain["time"] = str(plain["time"])
    profile: Profile = dataclasses.replace(merge(Profile(), plain, source), **collected)
    _check(profile, source)
    if not allow_setup:
        refuse_programs(profile, source)
    return profile


def refuse_programs(profile: Profile, source: str) -> None:
    """Refuse what may run a program, with a ConfigError that `source` begins."""
    doubts: list[tuple[str, Any, str]] = [("setup", line, "is a shell command") for line in profile.setup]
    if profile.container is not None:  # with its mounts and its Python
        doubts.append(("container", profile.container, "is an image, whose programs run as you"))
    doubts += [
        (f"environment.{name}", value, "is for a variable that may run a program")
        for name, value in profile.environment.items()
        if name not in _HARMLESS
    ]
    doubts += [
        (f"extra.{name}", value, f"is for an option that may do more than ask for resources{suggest(name, sorted(_RESOURCES))}")
        for name, value in profile.extra.items()
        if name not in _RESOURCES
    ]
    for key, value, why in doubts:
        raise ConfigError(f"{source}: {key}: {value!r} {why}; if you trust it, add --allow-setup")


def check_text(value: str, where: str) -> None:
    """Refuse text that could end a line of the batch script. Also refuse text that sbatch changes."""
    if not value or not value.isprintable() or "\\" in value:
        raise ConfigError(f"{where}: {value!r}: must be one line of text without backslashes, and not empty")


def _lines(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{where}: {value!r} is not a list of lines")
    for line in value:
        if not isinstance(line, str) or not line or not line.isprintable():
            raise ConfigError(f"{where}: {line!r} is not a line of text")
    return tuple(value)


def _named(read: Callable[[str, Any, str], Any], value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected settings below it, found {value!r}")
    return {key: read(key, each, f"{where}.{key}") for key, each in value.items()}


def _variable(name: str, value: Any, where: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ConfigError(f"{where}: {name!r} is not a variable's name")
    if type(value) is int:
        return str(value)
    if not isinstance(value, str) or not value.isprintable():
        raise ConfigError(f"{where}: {value!r} is not a line of text; put it in quotes")
    return value


def _option(name: str, value: Any, where: str) -> str | bool:
    if not re.fullmatch(r"[a-z][a-z0-9-]+", name):
        raise ConfigError(f"{where}: {name!r} is not a long option of sbatch, like exclusive or gpu-bind")
    # sbatch takes the beginning of a name for the name.
    if name not in _RESOURCES and (full := next((one for one in sorted({*_KEY_OF, *_FIXED}) if one.startswith(name)), None)):
        where += f" (sbatch reads it as {full})" * (full != name)
        raise ConfigError(f"{where}: {f'write {_KEY_OF[full]} instead' if full in _KEY_OF else 'is not for a profile to say'}")
    if value is True:
        return True
    if type(value) is int:
        return str(value)
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {value!r} is neither text nor true; put it in quotes")
    check_text(value, where)
    return value


def _seconds(time: str) -> int:
    """Return the seconds of a time limit; raises ValueError for other text."""
    if re.fullmatch(r"[0-9]+", time):
        return 60 * int(time)
    match = re.fullmatch(r"(?:([0-9]+)-)?([0-9]{1,3}):([0-5][0-9]):([0-5][0-9])", time)
    if match is None:
        raise ValueError(time)
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((24 * days + hours) * 60 + minutes) * 60 + seconds


def _check(profile: Profile, source: str) -> None:
    def refuse(key: str, why: str) -> typing.NoReturn:
        raise ConfigError(f"{source}: {key}: {getattr(profile, key)!r} {why}")

    for key, value in vars(profile).items():
        if isinstance(value, str):
            check_text(value, f"{source}: {key}")
    for key, _, why in out_of_range(profile):
        refuse(key, why)
    if profile.gpus_per_node and profile.tasks > profile.gpus_per_node:
        refuse("tasks_per_node", f"are more than the {profile.gpus_per_node} gpus_per_node; a rank takes one GPU")
    try:
        seconds = _seconds(profile.time)
    except ValueError:
        refuse("time", "is no time; write 2-00:00:00 for two days, 12:00:00 for twelve hours, or minutes")
    if seconds == 0:
        refuse("time", "is no time at all")
    if profile.stop_seconds >= seconds:
        refuse("stop_seconds", f"is not shorter than the time limit {profile.time}")
    if profile.mail_user is not None and profile.mail_type is None:
        refuse("mail_user", "has no effect without mail_type, like END,FAIL")
    for event in (profile.mail_type or "NONE").split(","):
        if event not in _MAIL_TYPES:
            refuse("mail_type", f"has an unknown event {event!r}{suggest(event, sorted(_MAIL_TYPES))}")
    if (profile.container is None) != (profile.container_runtime is None):
        refuse("container_runtime", f"contradicts container: {profile.container!r}; set both, or neither")
    for key in ("container_mounts", "container_python"):
        if profile.container is None and getattr(profile, key) != getattr(Profile, key):
            refuse(key, "has no effect without container")
    for mount in profile.container_mounts:
        check_text(mount, f"{source}: container_mounts")
        if not mount.startswith("/") or "," in mount:  # both runtimes put commas between mounts
            raise ConfigError(f"{source}: container_mounts: {mount!r} is not /FOLDER or /FOLDER:/INSIDE without commas")
