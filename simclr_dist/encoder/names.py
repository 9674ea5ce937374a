"""What is said of a path that holds no encoder: with the name of one that is there, or how there comes to be one."""

from pathlib import Path

from simclr_dist.system.errors import DataError

_NAMED = "RUN/encoders/step-XXXXXXXX.safetensors"


def newest_encoder(run: str | Path) -> Path | None:
    """A run's encoder of the highest step, of those that are whole; None where it has none."""
    return max((Path(run) / "encoders").glob("step-*.safetensors"), default=None)


def check_is_file(encoder: str | Path) -> None:
    """Raises DataError where there is no file, naming the newest encoder of the run that the path is of."""
    path = Path(encoder)
    if path.is_file():
        return
    what = "a folder, not an encoder" if path.is_dir() else "no such file"
    run = next((folder for folder in (path, *path.parents[:2]) if _is_run(folder)), None)
    if run is None:
        raise DataError(f"{path}: {what}; name an encoder of a run, {_NAMED}")
    if newest := newest_encoder(run):
        raise DataError(f"{path}: {what}; the newest of this run is {newest}")
    raise DataError(
        f"{path}: {what}; the run {run} has none yet: it exports one at its end, and every checkpoint.export_every steps"
        f" where that is set; `simclr-dist eval --watch {run}` evaluates each as it comes"
    )


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_dir() for name in ("checkpoints", "encoders"))
