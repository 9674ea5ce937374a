"""Send a run's metrics to W&B, MLflow or Trackio. A process of its own reads metrics.jsonl.

So a logger that fails, hangs or is slow costs the training nothing, and what it missed is sent at the next start. How far it
has got stands in RUN/loggers/NAME.json: steps that a resumed run takes again are not sent twice. Nothing leaves this machine,
unless the logger's own variables of the environment say so.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from simclr_dist.config.settings import Config
from simclr_dist.config.strict_yaml import leaves
from simclr_dist.run.folder import numbers_of, stored_config
from simclr_dist.system import files, signals
from simclr_dist.system.errors import LAYOUT, DamagedError, printable, reason_of

CLOSE_SECONDS = 10.0  # that the end of a training waits for its loggers
_LAST_SECONDS = 60  # that a logger has, when its training has gone
_PROJECT = "simclr_dist"
_LINES = 100  # that are sent before it is written down
_MOST_LOGGED = 1 << 20  # bytes of its own words that are looked at
# What the environment does not say otherwise: no network, no account, no report of its use to anybody.
_PRIVATE = {
    "WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_ANALYTICS_ENABLED": "False",
}  # fmt: skip

Metrics = Mapping[str, float]


class Sink(NamedTuple):
    """An opened run of a logger. `identity` is its name there, by which it is opened again."""

    identity: str
    send: Callable[[int, Metrics], None]
    finish: Callable[[], None]


def chosen(config: Config) -> list[str]:
    """List the loggers that the config asks for."""
    return [name for name in OPENERS if getattr(config.log, name)]


class Follower:
    """A logger's process, as the training sees it. No method raises for it or waits, except `wait`.

    `warn` gets one line when it ends too early. It is not told of stop signals; it ends when the training has.
    """

    def __init__(self, name: str, run: Path, warn: Callable[[str], None]) -> None:
        self._name, self._warn, self._log = name, warn, run / "loggers" / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        command = [sys.executable, "-m", __name__, name, str(run.resolve()), str(os.getpid())]
        try:
            self._log.parent.mkdir(exist_ok=True)
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
                    env={**_PRIVATE, **_places(run.resolve()), **os.environ},
                )  # fmt: skip
        except OSError as error:
            warn(f"{name}: its process cannot be started: {reason_of(error)}; training goes on without it")

    def poke(self, word: bytes = b".") -> None:
        """Tell it that there is a new line."""
        if self._process is not None and self._process.poll() is not None:
            self._lost(f"it ended with exit code {self._process.returncode}")
        if self._process is not None and (pipe := self._process.stdin):
            with suppress(OSError):  # it is full, as it does not read: its own loss; or it has just ended
                os.set_blocking(pipe.fileno(), False)
                os.write(pipe.fileno(), word)

    def wait(self, seconds: float) -> None:
        """Wait for its end. It is killed after `seconds`."""
        if self._process is None:
            return
        with self._process as process:
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with what it has started
                self._lost(f"it did not end within {CLOSE_SECONDS:g} s")
        if self._process is not None and process.returncode:
            self._lost(f"it ended with exit code {process.returncode}")

    def _lost(self, why: str) -> None:
        if self._process is not None and self._process.stdin:
            self._process.stdin.close()
        self._process, words = None, ""
        with suppress(OSError), self._log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _MOST_LOGGED))
            words = file.read().decode(errors="replace").strip().rpartition("\n")[2][:200]
        said = f" ({printable(words, keep=LAYOUT)})" if words else ""
        self._warn(f"{self._name}: {why}{said}: see {self._log}; training goes on, and the next start sends what is missing")


def end_all(followers: Sequence[Follower]) -> None:
    """Let them send the rest. Waits `CLOSE_SECONDS` at most, for all of them."""
    for follower in followers:
        follower.poke(b"q")  # and not the closed pipe alone: reading processes may hold a copy of that
    until = time.monotonic() + CLOSE_SECONDS
    for follower in followers:
        follower.wait(max(0.0, until - time.monotonic()))


def follow(name: str, run: Path, training: int) -> None:
    """Send the lines of RUN/metrics.jsonl to a logger, as they come. Returns when the training has ended."""
    signals.ignore()  # a scheduler tells all processes: the training decides
    # A logger that hangs does not see the end of the pipe, and would hold the lock for ever. Where the training had threads,
    # this signal comes several times.
    signal.signal(signal.SIGRTMIN, lambda *_: signal.alarm(_LAST_SECONDS))
    signals.die_with(training, signal.SIGRTMIN)
    state = run / "loggers" / f"{name}.json"
    with (run / "loggers" / f"{name}.log").open("rb") as log:
        with suppress(OSError):  # no locks
            files.lock(log.fileno(), wait=True)  # an earlier start's may still be at its last lines
        config = stored_config(run)
        assert config is not None, "the training has written it"
        reached = _reached(state)
        sink = OPENERS[name](run, config, reached["identity"])
        reached["identity"] = sink.identity
        _note(state, reached)
        lines, ended = _new_lines(run / "metrics.jsonl"), False
        while True:
            for number, metrics in enumerate(next(lines), start=1):
                if (step := int(metrics.pop("step"))) > reached["step"]:
                    sink.send(step, metrics)
                    reached["step"] = step
                    if number % _LINES == 0:
                        _note(state, reached)
            _note(state, reached)
            if ended:
                break
            word = os.read(0, 1 << 16)
            if ended := not word or b"q" in word:
                signal.alarm(_LAST_SECONDS)  # its default ends this process wherever it hangs
        sink.finish()


def _new_lines(path: Path) -> Iterator[list[dict[str, float]]]:
    """Yield what is new in metrics.jsonl, a dict a line. Its keys are TensorBoard's names, and step."""
    at = 0
    while True:
        content = b""
        with suppress(FileNotFoundError), path.open("rb") as file:
            file.seek(at)
            content = file.read()
        content = content[: content.rfind(b"\n") + 1]
        at += len(content)
        yield numbers_of(content)


def _reached(state: Path) -> dict[str, Any]:
    try:
        return files.read_object(state, {"identity": str, "step": int}) or {"identity": "", "step": 0}
    except DamagedError as error:
        print(f"{error}: the logger gets a new run")
        return {"identity": "", "step": 0}


def _note(state: Path, reached: Mapping[str, Any]) -> None:
    files.write_atomically(state, json.dumps(reached).encode())


def _places(run: Path) -> dict[str, str]:
    """Return where each logger writes unless the environment names another place."""
    return {"WANDB_DIR": str(run), "MLFLOW_TRACKING_URI": f"sqlite:///{run}/mlflow.db", "TRACKIO_DIR": str(run / "trackio")}


def _wandb(run: Path, config: Config, identity: str) -> Sink:
    import wandb

    identity = identity or secrets.token_hex(4)
    quiet = wandb.Settings(
        console="off", disable_code=True, disable_git=True, x_disable_meta=True, x_disable_stats=True, allow_val_change=True
    )
    project = os.environ.get("WANDB_PROJECT", _PROJECT)
    opened = wandb.init(project=project, name=run.name, id=identity, resume="allow", config=config.to_dict(), settings=quiet)
    return Sink(identity, lambda step, metrics: opened.log(dict(metrics), step=step), opened.finish)


def _mlflow(run: Path, config: Config, identity: str) -> Sink:
    from mlflow.entities import Metric, Param
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    client, name = MlflowClient(), os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
    if not identity:
        if client.get_experiment_by_name(name) is None:
            with suppress(MlflowException):  # the runs of a sweep begin at once: another one has just made it
                client.create_experiment(name)
        experiment = client.get_experiment_by_name(name)
        assert experiment is not None, f"MLflow makes no experiment {name!r}"
        identity = client.create_run(experiment.experiment_id, run_name=run.name).info.run_id
        # Parameters can never be changed there: they are those of the first start.
        client.log_batch(identity, params=[Param(key, str(value)[:500]) for key, value in leaves(config.to_dict())])
    client.update_run(identity, status="RUNNING")

    def send(step: int, metrics: Metrics) -> None:
        now = int(1000 * time.time())
        client.log_batch(identity, metrics=[Metric(key, value, now, step) for key, value in metrics.items()])

    return Sink(identity, send, lambda: client.set_terminated(identity))


def _trackio(run: Path, config: Config, identity: str) -> Sink:
    import trackio

    identity = identity or f"{run.name}-{secrets.token_hex(2)}"  # it knows runs by their names alone
    project = os.environ.get("TRACKIO_PROJECT", _PROJECT)
    opened = trackio.init(
        project=project, name=identity, resume="allow", config=config.to_dict(), auto_log_gpu=False, auto_log_cpu=False
    )
    return Sink(identity, lambda step, metrics: opened.log(dict(metrics), step=step), opened.finish)


OPENERS: dict[str, Callable[[Path, Config, str], Sink]] = {"wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio}

if __name__ == "__main__":
    follow(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
