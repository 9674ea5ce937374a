"""Train from Python. A process of its own does what `simclr-dist train` does."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simclr_dist.config.load import config_of
from simclr_dist.config.settings import Config
from simclr_dist.config.strict_yaml import write_yaml
from simclr_dist.encoder.names import newest_encoder
from simclr_dist.run.claim import newest_start
from simclr_dist.run.folder import read_metrics
from simclr_dist.run.status import End, read_note, read_status
from simclr_dist.system import errors

PARENT = "SIMCLR_DIST_PARENT"  # variable with the process whose end stops the command that `train` has started
# Of a rank: a notebook that has made a process group has them, our ranks get their own, and the command is none.
_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Run:
    """What a training has left. `metrics` are the last that were logged; `encoder` is the newest, None where there is none."""

    folder: Path
    state: str
    step: int
    encoder: Path | None
    metrics: dict[str, float]


def train(
    config: Config | Mapping[str, Any] | str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    processes: int | None = None,
    max_restarts: int = 3,
    say: Callable[[str], None] = print,
) -> Run:
    """Train, or resume, the run of a config; return what it left.

    `config` is a Config, a mapping or a YAML file. Keys of `overrides` are dotted: {"optim.base_lr": 0.1}. The ranks are
    processes of their own on this machine, as many as `simclr-dist train` starts, or `processes`. So a notebook will do, and a
    script without `if __name__`, and a process that has used CUDA. `say` gets each line that they print.

    An interrupt (Ctrl-C, a notebook's stop) saves a checkpoint, and is raised again; the same call goes on. A second one ends
    the ranks at once. When this process is killed, the run stops with a checkpoint too. Raises ConfigError and DataError (both
    are UserError) for what the command line refuses, DivergedError, StoppedError after another stop signal, and CrashedError
    once `max_restarts` starts in a row have brought no new checkpoint.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise errors.ConfigError("train: starts ranks itself; call it in one process, which torchrun has not started")
    checked = config_of(config, overrides or {})
    run = Path(checked.run_folder)
    earlier = newest_start(run)
    # Files in memory: a caller that is killed leaves nothing behind.
    with os.fdopen(os.memfd_create("config.yaml"), "wb") as config_file, os.fdopen(os.memfd_create("note"), "rb") as note_file:
        file, note = (Path(f"/proc/{os.getpid()}/fd/{one.fileno()}") for one in (config_file, note_file))
        file.write_text(write_yaml(checked.to_dict()), encoding="utf-8")
        options = [] if processes is None else ["--processes", str(processes)]
        options += ["--max-restarts", str(max_restarts)]
        options += ["--data.allow_pipe", "true"] * checked.data.allow_pipe  # which no file may set, and our caller has
        code, last = _follow(["train", str(file), *options], note, say)
        end = read_note(note) if note.stat().st_size else End("crashed", code)
    status = read_status(run)
    if code == 0:
        metrics = (read_metrics(run, last=True) or [{}])[-1]
        return Run(run, status.get("state", "done"), int(metrics.get("step", 0)), newest_encoder(run), metrics)
    reason = status.get("reason") if status.get("start", 0) > earlier else None
    raise _error(code, end, end.why or reason or last or f"the ranks ended with {code}")


def _follow(arguments: list[str], note: Path, say: Callable[[str], None]) -> tuple[int, str]:
    """Run `simclr-dist` to its end, and hand its lines on. Return its exit code and its last line."""
    environment = {name: value for name, value in os.environ.items() if name not in _OF_A_RANK}
    environment |= {"PYTHONSAFEPATH": "1", PARENT: str(os.getpid()), errors.LAST_WORD: str(note), "PYTHONUNBUFFERED": "1"}
    # This package, wherever it was imported from. Site-packages are there anyway, and go behind the standard library.
    paths = [str(_ROOT)] if _ROOT.name not in ("site-packages", "dist-packages") else []
    if paths := [*paths, *filter(None, [os.environ.get("PYTHONPATH")])]:
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    interrupted, last = False, ""
    with subprocess.Popen(
        [sys.executable, "-m", "simclr_dist", *arguments], env=environment, text=True, errors="replace",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,  # a terminal and Jupyter interrupt whole groups: only we are to, and once
    ) as child:  # fmt: skip
        assert child.stdout is not None
        try:
            while True:
                try:
                    for line in child.stdout:
                        last = line.strip() or last
                        say(line.rstrip("\n"))
                    code = child.wait()
                    break
                except KeyboardInterrupt:
                    child.send_signal(signal.SIGKILL if interrupted else signal.SIGTERM)
                    interrupted = True
        except BaseException:  # of `say`: nobody follows it any more
            child.terminate()
            raise
    if interrupted:
        raise KeyboardInterrupt
    return code, last.removeprefix("simclr-dist: ")


def _error(code: int, end: End, why: str) -> Exception:
    """Make the error that an exit code stands for."""
    if code == 2:
        mistakes = (kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.UserError))
        return next((kind for kind in mistakes if kind.__name__ == end.error), errors.UserError)(why)
    kinds = {3: errors.DivergedError, errors.PREEMPTED: errors.StoppedError}
    return kinds.get(code, errors.CrashedError)(why)
