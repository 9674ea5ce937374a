"""The run folder: opened for this run and no other, with what it was started with and what became of it."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from simclr_dist.atomic import write_atomically
from simclr_dist.config import Config, config_from_dict, difference
from simclr_dist.config_reader import read_yaml, write_yaml
from simclr_dist.errors import ConfigError, DivergedError, RankError, UserError


def check_run_folder(config: Config) -> bool:
    """True when the folder holds this run already; ConfigError when it holds something else."""
    run = Path(config.run_folder)
    # A start that was killed may have left the temporary file of config.yaml, and nothing else.
    if not run.exists() or (run.is_dir() and all(path.match(".config.yaml.*.tmp") for path in run.iterdir())):
        return False
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"run_folder: {config.run_folder!r} exists and is not a run folder; name another, or remove it")
    stored = config_from_dict(read_yaml((run / "config.yaml").read_text(), str(run / "config.yaml")), str(run / "config.yaml"))
    if changed := difference(stored, config):
        raise ConfigError(
            f"run_folder: {config.run_folder!r} holds another run ({'; '.join(changed)});"
            " name another folder, or undo the change"
        )
    return True


def open_run(config: Config, environment: Mapping[str, Any]) -> None:
    """Create the run folder, or enter it again; for rank 0.

    `environment` (with the `data_digest`) goes into env.json. Raises ConfigError when the folder belongs to another run, and
    when the run began with other images.
    """
    run = Path(config.run_folder)
    if check_run_folder(config) and (run / "env.json").exists():
        before = json.loads((run / "env.json").read_text()).get("data_digest")
        if before != environment.get("data_digest"):
            raise ConfigError(
                f"data.shards: {config.data.shards!r} holds other images than the run began with; name another run_folder"
            )
    run.mkdir(parents=True, exist_ok=True)
    write_atomically(run / "config.yaml", write_yaml(config.to_dict()).encode())  # first: it makes the run
    (run / "checkpoints").mkdir(exist_ok=True)
    write_atomically(run / "env.json", json.dumps(dict(environment), indent=2).encode() + b"\n")


@contextmanager
def recorded(run: Path, *, writer: bool) -> Iterator[None]:
    """Keep status.json true: running within it, then done, failed, diverged or crashed; `writer` is rank 0."""
    if writer:
        write_status(run, "running", None)
    try:
        yield
    except (UserError, DivergedError) as error:
        if writer or isinstance(error, RankError):
            state, code = ("diverged", 3) if isinstance(error, DivergedError) else ("failed", 2)
            write_status(run, state, code, reason=str(error))
        raise
    except BaseException as error:
        # A rank that said why it ended takes the others' connections with it: its word stands.
        if writer and read_status(run).get("state") == "running":
            write_status(run, "crashed", 1, reason=f"{type(error).__name__}: {error}")
        raise
    if writer:
        write_status(run, "done", 0)


def write_status(run: Path, state: str, exit_code: int | None, **more: Any) -> None:
    """Say in status.json what became of the run: torchrun flattens exit codes to 1."""
    status = {"state": state, "exit_code": exit_code, "time": time.time(), **more}
    write_atomically(run / "status.json", json.dumps(status, indent=2).encode() + b"\n")


def read_status(run: Path) -> dict[str, Any]:
    """status.json, or {} when there is none."""
    try:
        status: dict[str, Any] = json.loads((run / "status.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return status


def truncate_metrics(run: Path, step: int) -> None:
    """Drop metrics.jsonl's lines from after `step`: a resumed run writes them again."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # the last line of a killed run may be a part of one
        if entry["step"] <= step:
            kept.append(line.rstrip(b"\n") + b"\n")
    write_atomically(path, b"".join(kept))
