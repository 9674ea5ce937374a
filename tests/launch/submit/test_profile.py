"""Profiles: strict, one line for what is wrong, and nothing that could become a line of the batch script."""

import dataclasses
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from simclr_dist.config.strict_yaml import read_yaml
from simclr_dist.launch.slurm import profile as rules
from simclr_dist.launch.slurm.profile import Profile, load_profile, profile_from_dict
from simclr_dist.system.errors import ConfigError

PROFILES = sorted((Path(__file__).parents[3] / "launch" / "profiles").glob("*.yaml"))

EVERYTHING: dict[str, Any] = {
    "partition": "a,b",
    "account": "me",
    "qos": "high",
    "nodes": 3,
    "gpus_per_node": 4,
    "tasks_per_node": 2,
    "cpus_per_task": 5,
    "time": "2-03:04:05",
    "memory_gb": 1.5,
    "constraint": "a100&[ib|opa]",
    "exclude": "n[1-2]",
    "reservation": "r",
    "container": "/images/x y.sif",
    "container_runtime": "apptainer",
    "container_mounts": ["/data", "/scratch:/tmp"],
    "container_python": "/opt/python",
    "setup": ["module load cuda", "ulimit -n 4096"],
    "mail_user": "me@example.org",
    "mail_type": "END,FAIL",
    "environment": {"NAME": "it's $HOME", "NUMBER": 1, "EMPTY": ""},
    "stop_seconds": 60,
    "max_restarts": 0,
    "extra": {"exclusive": True, "gpu-bind": "single:1", "nice": 5},
}


def test_every_key_is_read_and_survives_json() -> None:
    assert set(EVERYTHING) == {key.name for key in dataclasses.fields(Profile)}
    profile = profile_from_dict(EVERYTHING, "here", allow_setup=True)
    for key, value in EVERYTHING.items():
        assert getattr(profile, key) != getattr(Profile(), key), key
        if isinstance(value, str | float):
            assert getattr(profile, key) == value
    assert profile.environment == {"NAME": "it's $HOME", "NUMBER": "1", "EMPTY": ""}
    assert profile.extra == {"exclusive": True, "gpu-bind": "single:1", "nice": "5"}
    assert (profile.tasks, profile.world_size, profile.minutes) == (2, 6, 2 * 1440 + 3 * 60 + 5)
    assert profile_from_dict(json.loads(json.dumps(dataclasses.asdict(profile))), "there", allow_setup=True) == profile


def test_a_rank_a_gpu_unless_said_otherwise() -> None:
    assert Profile(nodes=2).world_size == 16
    assert Profile(gpus_per_node=0).tasks == 1
    assert Profile(gpus_per_node=0, tasks_per_node=3).tasks == 3


@pytest.mark.parametrize(
    ("time", "minutes"), [("90", 90), (90, 90), ("12:00:00", 720), ("2-00:00:00", 2880), ("00:02:31", 3), ("100:00:00", 6000)]
)
def test_times(time: Any, minutes: int) -> None:
    assert profile_from_dict({"time": time, "stop_seconds": 20}, "here").minutes == minutes


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"partitoin": "x"}, "partitoin: unknown key; did you mean 'partition'?"),
    "wrong type": ({"nodes": "two"}, "nodes: 'two' is not a whole number"),
    "number for a name": ({"account": 2024}, "account: 2024 is not text"),
    "no machine": ({"nodes": 0}, "nodes: 0 is too small; the least is 1"),
    "memory": ({"memory_gb": -1}, "memory_gb: -1.0 is too small"),
    "restarts": ({"max_restarts": -1}, "max_restarts: -1 is too small"),
    "ranks and GPUs": ({"gpus_per_node": 2, "tasks_per_node": 3}, "tasks_per_node: 3 are more than the 2 gpus_per_node"),
    "no time": ({"time": "soon"}, "time: 'soon' is no time; write 2-00:00:00 for two days"),
    "hours or minutes?": ({"time": "12:00"}, "time: '12:00' is no time; write"),
    "61 seconds": ({"time": "00:00:61"}, "time: '00:00:61' is no time"),
    "zero": ({"time": 0}, "time: '0' is no time at all"),
    "time as a list": ({"time": [1]}, "time: [1] is not text"),
    "stop too late": ({"stop_seconds": 0}, "stop_seconds: 0 is out of range; 1 to 65535"),
    "stop before the start": ({"time": 2}, "stop_seconds: 120 is not shorter than the time limit 2"),
    "image without runtime": ({"container": "/x.sif"}, "container_runtime: None contradicts container: '/x.sif'"),
    "runtime without image": ({"container_runtime": "pyxis"}, "container_runtime: 'pyxis' contradicts container: None"),
    "unknown runtime": ({"container_runtime": "docker"}, "container_runtime: 'docker' is not one of apptainer, pyxis"),
    "mount without image": ({"container_mounts": ["/x"]}, "container_mounts: ('/x',) has no effect without container"),
    "relative mount": (
        {"container": "/x", "container_runtime": "pyxis", "container_mounts": ["data"]},
        "container_mounts: 'data' is not /FOLDER",
    ),
    "two mounts in one": (
        {"container": "/x", "container_runtime": "pyxis", "container_mounts": ["/a,/b"]},
        "container_mounts: '/a,/b' is not /FOLDER",
    ),
    "mail to nobody": ({"mail_user": "me@x.org"}, "mail_user: 'me@x.org' has no effect without mail_type"),
    "mail of what": ({"mail_type": "END,FIAL"}, "mail_type: 'END,FIAL' has an unknown event 'FIAL'; did you mean 'FAIL'?"),
    "environment as a list": ({"environment": ["A=1"]}, "environment: expected settings below it, found ['A=1']"),
    "variable's name": ({"environment": {"A B": "1"}}, "environment.A B: 'A B' is not a variable's name"),
    "variable's value": ({"environment": {"A": True}}, "environment.A: True is not a line of text; put it in quotes"),
    "variable of two lines": ({"environment": {"A": "1\nrm"}}, r"environment.A: '1\nrm' is not a line of text"),
    "set-up as text": ({"setup": "module load x"}, "setup: 'module load x' is not a list of lines"),
    "set-up of two lines": ({"setup": ["a\nb"]}, r"setup: 'a\nb' is not a line of text"),
    "option we have a key for": ({"extra": {"time": "1:00"}}, "extra.time: write time instead"),
    "option we set": ({"extra": {"open-mode": "truncate"}}, "extra.open-mode: is not for a profile to say"),
    "requeue": ({"extra": {"no-requeue": True}}, "extra.no-requeue: is not for a profile to say"),
    "short option": ({"extra": {"p": "main"}}, "extra.p: 'p' is not a long option of sbatch"),
    "dashes": ({"extra": {"--nice": "5"}}, "extra.--nice: '--nice' is not a long option of sbatch"),
    "option false": ({"extra": {"exclusive": False}}, "extra.exclusive: False is neither text nor true"),
    "option by its beginning": ({"extra": {"wra": "date"}}, "extra.wra (sbatch reads it as wrap): is not for a profile to say"),
    "our option by its beginning": ({"extra": {"expor": "ALL"}}, "extra.expor (sbatch reads it as export): write environment"),
    "Python without image": ({"container_python": "/x"}, "container_python: '/x' has no effect without container"),
    "option of two lines": ({"extra": {"nice": "1\n#SBATCH --x"}}, r"extra.nice: '1\n#SBATCH --x': must be one line"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_one_line_with_file_and_key(name: str, tmp_path: Path) -> None:
    values, message = BAD[name]
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError) as refused:
        load_profile(path, allow_setup=True)
    assert f"{path}: {message}" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("key", [key for key, value in EVERYTHING.items() if isinstance(value, str)])
@pytest.mark.parametrize("bad", ["x\n#SBATCH --wrap=evil", "x\r", "back\\slash", "\x1b[0m", ""])
def test_no_text_can_leave_its_line(key: str, bad: str) -> None:
    values = EVERYTHING | {key: bad}
    with pytest.raises(ConfigError, match=f"^here: {key}: "):
        profile_from_dict(values, "here", allow_setup=True)


def test_set_up_lines_must_be_allowed(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("setup: [module load cuda]")
    with pytest.raises(ConfigError, match="setup: 'module load cuda' is a shell command; if you trust it, add --allow-setup"):
        load_profile(path)
    assert load_profile(path, allow_setup=True).setup == ("module load cuda",)


PROGRAMS: dict[str, dict[str, Any]] = {
    "setup: 'date' is a shell command": {"setup": ["date"]},
    "container: '/x.sif' is an image, whose programs run as you": {"container": "/x.sif", "container_runtime": "apptainer"},
    "container: '/y.sif' is": {"container": "/y.sif", "container_runtime": "pyxis", "container_python": "/mine/python"},
    "extra.bb: 'x' is for an option that may do more than ask for resources": {"extra": {"nice": 1, "bb": "x"}},
    "extra.exclusiv: True is for an option that may do more than ask for resources; did you mean 'exclusive'?": {
        "extra": {"exclusiv": True}
    },
} | {
    f"environment.{name}: 'x' is for a variable that may run a program": {"environment": {"NCCL_DEBUG": "INFO", name: "x"}}
    for name in (
        "LD_PRELOAD", "LD_LIBRARY_PATH", "LD_AUDIT", "PATH", "PYTHONPATH", "PYTHONSTARTUP", "PYTHONHOME", "BASH_ENV", "ENV",
        "IFS", "SHELLOPTS", "PROMPT_COMMAND", "GIT_SSH_COMMAND", "SLURM_TASK_PROLOG", "SBATCH_EXPORT", "NCCL_NET_PLUGIN",
        "NCCL_CONF_FILE", "NCCL_DEBUG_FILE", "OMP_TOOL_LIBRARIES", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "CC",
        "CXX", "UCX_MODULE_DIR", "FI_PROVIDER_PATH", "TRITON_CACHE_DIR", "CUDA_INJECTION64_PATH", "https_proxy", "nccl_debug",
    )
}  # fmt: skip


@pytest.mark.parametrize("message", PROGRAMS)
def test_what_may_run_a_program_must_be_allowed(message: str, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(PROGRAMS[message]))
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{tmp_path}/p.yaml: {message}')}") as refused:
        load_profile(tmp_path / "p.yaml")
    assert str(refused.value).endswith("; if you trust it, add --allow-setup")
    assert load_profile(tmp_path / "p.yaml", allow_setup=True)


def test_options_of_resources_are_those_of_sbatch() -> None:
    """By their full names, and none that `extra` may never have."""
    manual = subprocess.run(["man", "sbatch"], capture_output=True, text=True, check=False).stdout
    if not manual:
        pytest.skip("no manual of sbatch")
    of_later_versions = {
        "consolidate-segments", "oom-kill-step", "segment", "spread-segments", "tres-bind", "tres-per-task"
    }  # fmt: skip
    plain = re.sub(".\b", "", manual).replace("\N{HYPHEN}", "-")
    assert not rules._RESOURCES & {*rules._KEY_OF, *rules._FIXED}
    assert rules._RESOURCES - set(re.findall(r"^ +(?:-\w, )?--([a-z-]+)", plain, re.MULTILINE)) <= of_later_versions


@pytest.mark.parametrize("content", [None, b"\xff", b"- a", b"nodes: [", b"nodes: 1\nnodes: 2"])
def test_unreadable_files(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^{path}: "):
        load_profile(path)


def test_a_mistyped_file_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the profile: No such file or directory; write one like those in"):
        load_profile(tmp_path / "gpu.yaml")
    (tmp_path / "gpu8.yaml").touch()
    with pytest.raises(ConfigError, match=r"No such file or directory; did you mean '.*/gpu8.yaml'\?$"):
        load_profile(tmp_path / "gpu.yaml")


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_shipped_profiles(path: Path) -> None:
    profile = load_profile(path)
    assert profile.partition
    assert {"gpu8": 32, "preemptable": 8, "cpu_test": 2, "cpu_parts": 1}[path.stem] == profile.world_size
    # What stands in comments is right as well.
    keys = "|".join(key.name for key in dataclasses.fields(Profile))
    everything = re.sub(rf"^# ((?:{keys}):|  - )", r"\1", path.read_text(), flags=re.MULTILINE)
    assert profile_from_dict(read_yaml(everything, str(path)), str(path), allow_setup=True)


def test_every_key_is_in_the_documents_with_its_default() -> None:
    table = (Path(__file__).parents[3] / "docs" / "cluster.md").read_text(encoding="utf-8")
    for key in dataclasses.fields(Profile):
        assert (row := re.search(rf"^\| `{key.name}` \| .+ \| (.+) \|$", table, re.MULTILINE)), key.name
        if key.default not in (None, ()) and key.default is not dataclasses.MISSING:
            assert row[1] == str(key.default)
