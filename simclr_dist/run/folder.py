"""Open the run folder for this run and no other. It holds the config and the environment that the run started with."""

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from simclr_dist.config.load import config_from_dict, difference
from simclr_dist.config.settings import Config
from simclr_dist.config.strict_yaml import read_settings, write_yaml
from simclr_dist.run.claim import Claim, claim_run, is_dead, refuse_if_held
from simclr_dist.run.status import read_status
from simclr_dist.run.steps import steps_in
from simclr_dist.system import files
from simclr_dist.system.errors import ConfigError, DamagedError, DataError, SaveError, say
from simclr_dist.system.files import write_atomically
from simclr_dist.system.provenance import code_state, packages

# What a folder may hold before its first start: of a submission, or of a start that was killed before config.yaml.
_BEFORE_THE_RUN = ("slurm", "submission.json", "ledger.jsonl", "cancelled", "starts", "heartbeat", ".*.tmp")
# What a start must be able to do with its files; what else it cannot write, it says and goes on.
_FILES = dict.fromkeys(("config.yaml", "env.json", "metrics.jsonl", "status.json"), os.R_OK)  # it replaces them
_FILES |= dict.fromkeys(("heartbeat", "ledger.jsonl"), os.R_OK | os.W_OK)
_FOLDERS = dict.fromkeys((".", "checkpoints", "encoders", "starts"), os.R_OK | os.W_OK | os.X_OK)
_TAIL = 1 << 16  # bytes of metrics.jsonl: some forty lines


def check_run_folder(config: Config, *, held: bool = False) -> bool:
    """Return whether the folder holds this run already.

    Raises ConfigError when it holds something else and, unless `held`, when another start is using it. Raises DataError when
    a part of it cannot be read.
    """
    run = Path(config.run_folder)
    _check_parts(run)
    if not run.exists():
        place = existing_part(run)
        if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK, effective_ids=True)):
            why = f"cannot be made: {str(place)!r} is no folder that you can write to, or its disk is read-only"
            raise ConfigError(f"run_folder: {config.run_folder!r} {why}; name another")
        return False
    if run.is_dir() and all(any(path.match(name) for name in _BEFORE_THE_RUN) for path in run.iterdir()):
        return False
    if (stored := stored_config(run)) is None:
        raise ConfigError(f"run_folder: {config.run_folder!r} exists and is not a run folder; name another")
    if changed := difference(stored, config):
        what = f"{config.run_folder!r} holds another run ({'; '.join(changed)})"
        removed = "; nothing is saved in it: remove it," if _is_bare(run) else ";"
        raise ConfigError(f"run_folder: {what}{removed} name another folder, or undo the change")
    if not held:
        refuse_if_held(run)
    return True


def _is_bare(run: Path) -> bool:
    """Tell whether the run ended before its first step."""
    saved = ("checkpoints/*", "encoders/*", "metrics.jsonl", "submission.json")
    ended = is_dead(run) and read_status(run).get("state") not in ("done", "diverged")
    return ended and not any(next(run.glob(name), None) for name in saved)


def stored_config(run: Path) -> Config | None:
    """Return the settings of the run's last start; None before the first. Raises ConfigError for a damaged file."""
    if not (path := run / "config.yaml").is_file():
        return None
    return config_from_dict(read_settings(path, "run's config", "put a copy of it back"), str(path))


def open_run(config: Config, environment: Mapping[str, Any]) -> Claim:
    """Create the run folder, or enter it again, and hold it. For rank 0.

    `environment` (with the `data_digest`) goes into env.json, with the packages and the state of the code. Raises ConfigError
    when the folder belongs to another run, is in use, or holds a run that began with other images. Raises SaveError when the
    disk does not take it.
    """
    run = Path(config.run_folder)
    with _writing(run), ExitStack() as on_error:
        if check_run_folder(config, held=True):
            try:
                check_same_images(config, digest_before(run), environment.get("data_digest"))
            except DamagedError as error:
                say(f"{error}: written anew", "WARNING: ")
        run.mkdir(parents=True, exist_ok=True)
        claim = claim_run(run)
        on_error.callback(claim.release)
        for folder in (run, *filter(Path.is_dir, run.iterdir())):
            files.remove_leftovers(folder)
        write_atomically(run / "config.yaml", write_yaml(config.to_dict()).encode(), claim.check)  # first: it makes the run
        (run / "checkpoints").mkdir(exist_ok=True)
        described = {**environment, "code": code_state(run), "packages": packages()}
        write_atomically(run / "env.json", json.dumps(described, indent=2).encode() + b"\n", claim.check)
        on_error.pop_all()
    return claim


def existing_part(path: Path) -> Path:
    """Return the path, or the folder in which it would be made. A file in the way counts."""
    while not os.path.lexists(path):
        path = path.absolute().parent
    return path


def check_room(config: Config, total: int, checkpoint: float, encoder: float) -> None:
    """Refuse a run whose files do not fit on its disk.

    `total`: its steps; the sizes are a file's bytes. What the run has saved already is room for what replaces it.
    """
    run, needed, room = Path(config.run_folder), Counter[int](), Counter[int]()
    if newest_step(run) >= total:
        return
    checkpoints, encoders = config.files_kept(total)
    for name, size in (("checkpoints", checkpoints * checkpoint), ("encoders", encoders * encoder)):
        disk = (place := existing_part(run / name)).stat().st_dev
        saved = sum(path.stat().st_size for path in (run / name).glob("step-*"))
        room[disk] = (room[disk] or shutil.disk_usage(place).free) + saved
        needed[disk] += int(size)
    for disk, size in needed.items():
        if size > room[disk]:
            files = f"checkpoints {checkpoints} x {_mib(checkpoint)}, encoders {encoders} x {_mib(encoder)}"
            why = f"its files need {_mib(size)} ({files}), and the disk has {_mib(room[disk])} for them"
            raise ConfigError(f"run_folder: {config.run_folder!r}: {why}; make room, or lower checkpoint.keep_last")


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"


def newest_step(run: Path) -> int:
    """Return the step of the newest sealed checkpoint; 0 for none."""
    return max(steps_in(run / "checkpoints", ".json"), default=0)


def digest_before(run: Path) -> object:
    """Return the digest of a run's images. None where it is not known. Raises DamagedError."""
    return files.read_object(run / "env.json", {"data_digest?": str | None}).get("data_digest")


def check_same_images(config: Config, before: object, now: object) -> None:
    """Raise ConfigError where the run began with images of another digest. None for one that is not known."""
    if before is not None and before != now:
        what = f"{config.data.shards!r} holds other images than the run began with"
        raise ConfigError(f"data.shards: {what}; name another run_folder")


def truncate_metrics(run: Path, step: int) -> None:
    """Drop metrics.jsonl's lines after `step`. A resumed run writes them again. Raises SaveError as `open_run` does.

    Damaged lines go too, but then the file as it was is kept under another name.
    """
    path = run / "metrics.jsonl"
    if not path.exists():
        return
    with _writing(path):
        content = path.read_bytes()
        lines = list(files.json_lines(content, _metrics))
        kept = [line.rstrip(b"\n") + b"\n" for line, entry in lines if entry is not None and entry["step"] <= step]
        if damaged := sum(entry is None for _, entry in lines):
            copy = files.keep_damaged(path, content)
            say(f"{path}: {damaged} damaged lines are left out of it; the file as it was is {copy.name}", "WARNING: ")
        write_atomically(path, b"".join(kept))


def read_metrics(run: Path, *, last: bool = False) -> list[dict[str, float]]:
    """Return `numbers_of` metrics.jsonl, or of its `last` lines alone. Return [] where it cannot be read."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL) if last else 0)
            content = file.read()
    except OSError:
        return []
    return numbers_of(content)


def numbers_of(content: bytes) -> list[dict[str, float]]:
    """Return the finite numbers of metrics.jsonl's lines, a dict a line. Damaged lines are left out.

    Speeds, which stand apart in the file as `timing`, are among them.
    """
    entries = [entry for _, entry in files.json_lines(content, _metrics) if entry is not None]
    flat = (entry | timing if isinstance(timing := entry.get("timing"), dict) else entry for entry in entries)
    return [{name: value for name, value in entry.items() if _is_number(value)} for entry in flat]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < sys.float_info.max


def _metrics(value: Any) -> dict[str, Any]:
    return files.fitting(value, {"step": int})


def _check_parts(run: Path) -> None:
    for name, mode in (_FOLDERS | _FILES).items() if run.is_dir() else ():
        path = run / name
        what, fits = ("folder", os.path.isdir(path)) if name in _FOLDERS else ("file", os.path.isfile(path))
        if os.path.lexists(path) and not (fits and os.access(path, mode, effective_ids=True)):
            raise DataError(f"{path}: is no {what} that you can read and write; mend that, or move it elsewhere")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SaveError(error.filename or path, error) from error
