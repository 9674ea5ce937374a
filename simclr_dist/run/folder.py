"""The run folder: opened for this run and no other, with what it was started with and what became of it."""

import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from simclr_dist.config.load import config_from_dict, difference
from simclr_dist.config.settings import Config
from simclr_dist.config.strict_yaml import read_yaml, write_yaml
from simclr_dist.run import claim as ledger
from simclr_dist.system import signals
from simclr_dist.system.errors import (
    PREEMPTED,
    ConfigError,
    DivergedError,
    RankError,
    SaveError,
    StoppedError,
    TakenOverError,
    UserError,
)
from simclr_dist.system.files import write_atomically
from simclr_dist.system.provenance import code_state, packages

# What a folder may hold before its first start: of a submission, or of a start that was killed before config.yaml.
_BEFORE_THE_RUN = ("slurm", "submission.json", "ledger.jsonl", "cancelled", "starts", "heartbeat", ".*.tmp")


def check_run_folder(config: Config, *, held: bool = False) -> bool:
    """True when the folder holds this run already; ConfigError when it holds something else, or (unless `held`) is in use."""
    run = Path(config.run_folder)
    if not run.exists() or (run.is_dir() and all(any(path.match(name) for name in _BEFORE_THE_RUN) for path in run.iterdir())):
        return False
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"run_folder: {config.run_folder!r} exists and is not a run folder; name another")
    stored = config_from_dict(read_yaml((run / "config.yaml").read_text(), str(run / "config.yaml")), str(run / "config.yaml"))
    if changed := difference(stored, config):
        raise ConfigError(
            f"run_folder: {config.run_folder!r} holds another run ({'; '.join(changed)});"
            " name another folder, or undo the change"
        )
    if not held:
        ledger.refuse_if_held(run)
    return True


def open_run(config: Config, environment: Mapping[str, Any]) -> ledger.Claim:
    """Create the run folder, or enter it again, and hold it; for rank 0.

    `environment` (with the `data_digest`) goes into env.json, with the packages and the state of the code. Raises ConfigError
    when the folder belongs to another run or is in use, and when the run began with other images; SaveError when the disk
    does not take it.
    """
    run = Path(config.run_folder)
    with _writing(run):
        return _open(config, run, environment)


def _open(config: Config, run: Path, environment: Mapping[str, Any]) -> ledger.Claim:
    if check_run_folder(config, held=True) and (run / "env.json").exists():
        before = json.loads((run / "env.json").read_text()).get("data_digest")
        if before != environment.get("data_digest"):
            raise ConfigError(
                f"data.shards: {config.data.shards!r} holds other images than the run began with; name another run_folder"
            )
    run.mkdir(parents=True, exist_ok=True)
    claim = ledger.claim(run)
    with ExitStack() as on_error:
        on_error.callback(claim.release)
        write_atomically(run / "config.yaml", write_yaml(config.to_dict()).encode())  # first: it makes the run
        (run / "checkpoints").mkdir(exist_ok=True)
        described = {**environment, "code": code_state(run), "packages": packages()}
        write_atomically(run / "env.json", json.dumps(described, indent=2).encode() + b"\n")
        on_error.pop_all()
    return claim


@contextmanager
def recorded(run: Path, claim: ledger.Claim | None) -> Iterator[None]:
    """Keep status.json true: running within it, then done, preempted, failed, diverged or crashed; so the ledger.

    `claim` is rank 0's; the other ranks say only what no other can know.
    """
    began = time.monotonic()

    def end(state: str, code: int, why: str | None = None) -> None:
        # torch raises out of its handler when a reading process has died: not in the middle of this.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if claim is not None:
            claim.check()  # one that was left behind ends somehow, and must not say so in the other start's folder
        if claim is None or read_status(run).get("state") == "running":
            write_status(run, state, code, **({} if why is None else {"reason": why}))
        if claim is not None:
            asked = {} if (at := signals.asked_at()) is None else {"asked": at}
            seconds = time.monotonic() - began
            ledger.record(run, "stop", state=state, exit_code=code, why=why, step=claim.step, seconds=seconds, **asked)
            claim.beat(claim.step, ended=True)
            claim.release()

    if claim is not None:
        write_status(run, "running", None)
    try:
        yield
    except TakenOverError:
        raise  # the folder, with its status, belongs to the other start
    except StoppedError as stopped:
        if claim is not None:
            end("preempted", PREEMPTED, str(stopped))
        raise
    except (UserError, DivergedError) as error:
        if claim is not None or isinstance(error, RankError):
            state, code = ("diverged", 3) if isinstance(error, DivergedError) else ("failed", 2)
            end(state, code, str(error))
        raise
    except BaseException as error:
        if claim is not None:
            # A rank that said why it ended takes the others' connections with it: its word stands.
            said = read_status(run)
            if said.get("state") == "running":
                end("crashed", 1, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            else:
                end(str(said.get("state")), int(said.get("exit_code") or 1), said.get("reason"))
        raise
    if claim is not None:
        end("done", 0)


def note_death(run: Path) -> None:
    """Have status.json say so when it says running and the process that it means is no more; for a parent that outlives it."""
    if read_status(run).get("state") == "running" and ledger.is_dead(run):
        beat = ledger.heartbeat(run)
        why = "ended without a word: killed, or cut off"
        write_status(run, "crashed", 1, reason=why)
        ledger.record(run, "stop", state="crashed", exit_code=1, why=why, step=beat.get("step", 0))


def write_status(run: Path, state: str, exit_code: int | None, **more: Any) -> None:
    """Say in status.json what became of the run's last start: torchrun flattens exit codes to 1.

    `alarms` that a start had when it ended stay. A full disk must not hide the reason.
    """
    if state != "running" and (alarms := read_status(run).get("alarms")):
        more = {"alarms": alarms, **more}
    status = {"state": state, "exit_code": exit_code, "start": ledger.newest_start(run), "time": time.time(), **more}
    try:
        write_atomically(run / "status.json", json.dumps(status, indent=2).encode() + b"\n")
    except OSError as error:
        print(f"WARNING: {run / 'status.json'}: {error.strerror}: lost: {json.dumps(status)}", file=sys.stderr, flush=True)


def read_status(run: Path) -> dict[str, Any]:
    """status.json, or {} when there is none."""
    try:
        status: dict[str, Any] = json.loads((run / "status.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return status


def newest_step(run: Path) -> int:
    """The step of the newest sealed checkpoint; 0 for none."""
    names = (path.stem.removeprefix("step-") for path in (run / "checkpoints").glob("step-*.json"))
    return max((int(name) for name in names if name.isdecimal()), default=0)


def truncate_metrics(run: Path, step: int) -> None:
    """Drop metrics.jsonl's lines from after `step`: a resumed run writes them again. SaveError when the disk refuses."""
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
    with _writing(path):
        write_atomically(path, b"".join(kept))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SaveError(f"{error.filename or path}: cannot be written: {error.strerror}") from error
