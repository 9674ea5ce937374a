"""Open the run folder for this run and no other. It holds the config and the environment that the run started with."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from simclr_dist.config.load import config_from_dict, difference
from simclr_dist.config.settings import Config
from simclr_dist.config.strict_yaml import read_yaml, write_yaml
from simclr_dist.run.claim import Claim, claim_run, refuse_if_held
from simclr_dist.run.steps import steps_in
from simclr_dist.system.errors import ConfigError, SaveError
from simclr_dist.system.files import write_atomically
from simclr_dist.system.provenance import code_state, packages

# What a folder may hold before its first start: of a submission, or of a start that was killed before config.yaml.
_BEFORE_THE_RUN = ("slurm", "submission.json", "ledger.jsonl", "cancelled", "starts", "heartbeat", ".*.tmp")


def check_run_folder(config: Config, *, held: bool = False) -> bool:
    """Return whether the folder holds this run already.

    Raises ConfigError when it holds something else and, unless `held`, when another start is using it.
    """
    run = Path(config.run_folder)
    if not run.exists() or (run.is_dir() and all(any(path.match(name) for name in _BEFORE_THE_RUN) for path in run.iterdir())):
        return False
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"run_folder: {config.run_folder!r} exists and is not a run folder; name another")
    stored = config_from_dict(read_yaml((run / "config.yaml").read_text(), str(run / "config.yaml")), str(run / "config.yaml"))
    if changed := difference(stored, config):
        what = f"{config.run_folder!r} holds another run ({'; '.join(changed)})"
        raise ConfigError(f"run_folder: {what}; name another folder, or undo the change")
    if not held:
        refuse_if_held(run)
    return True


def open_run(config: Config, environment: Mapping[str, Any]) -> Claim:
    """Create the run folder, or enter it again, and hold it. For rank 0.

    `environment` (with the `data_digest`) goes into env.json, with the packages and the state of the code. Raises ConfigError
    when the folder belongs to another run, is in use, or holds a run that began with other images. Raises SaveError when the
    disk does not take it.
    """
    run = Path(config.run_folder)
    with _writing(run), ExitStack() as on_error:
        if check_run_folder(config, held=True) and (run / "env.json").exists():
            before = json.loads((run / "env.json").read_text()).get("data_digest")
            if before != environment.get("data_digest"):
                what = f"{config.data.shards!r} holds other images than the run began with"
                raise ConfigError(f"data.shards: {what}; name another run_folder")
        run.mkdir(parents=True, exist_ok=True)
        claim = claim_run(run)
        on_error.callback(claim.release)
        write_atomically(run / "config.yaml", write_yaml(config.to_dict()).encode())  # first: it makes the run
        (run / "checkpoints").mkdir(exist_ok=True)
        described = {**environment, "code": code_state(run), "packages": packages()}
        write_atomically(run / "env.json", json.dumps(described, indent=2).encode() + b"\n")
        on_error.pop_all()
    return claim


def newest_step(run: Path) -> int:
    """Return the step of the newest sealed checkpoint; 0 for none."""
    return max(steps_in(run / "checkpoints", ".json"), default=0)


def truncate_metrics(run: Path, step: int) -> None:
    """Drop metrics.jsonl's lines after `step`. A resumed run writes them again. Raises SaveError as `open_run` does."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        with suppress(ValueError):  # the last line of a killed run may be a part of one
            if json.loads(line)["step"] <= step:
                kept.append(line.rstrip(b"\n") + b"\n")
    with _writing(path):
        write_atomically(path, b"".join(kept))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SaveError(f"{error.filename or path}: cannot be written: {error.strerror}") from error
