"""Tell which runs of a sweep a start goes on with."""

from pathlib import Path

from simclr_dist.config.load import difference
from simclr_dist.config.settings import Config
from simclr_dist.run.claim import is_held
from simclr_dist.run.folder import stored_config
from simclr_dist.run.status import outlook
from simclr_dist.run.summary import is_run
from simclr_dist.system.errors import ConfigError


def check_sweep_folder(folder: Path) -> None:
    """Raise ConfigError for a folder that is a run's own."""
    if is_run(folder):
        raise ConfigError(f"run_folder: {str(folder)!r} holds a run, and a sweep's runs have folders in its own; name another")


def why_left(config: Config, *, evaluated: bool = True) -> str | None:
    """Return why a run is not started: done, diverged, or at work. None for all others, failed ones among them.

    None also for one that is done and not `evaluated`, and for a run of other settings, which its start refuses.
    """
    run = Path(config.run_folder)
    if not is_run(run):
        return None
    if is_held(run):
        return "is running, and left alone"
    end, stored = outlook(run), stored_config(run)
    if stored and difference(stored, config):
        return None
    if end.state == "done" and stored and (stored.steps, stored.epochs) == (config.steps, config.epochs) and evaluated:
        return "is done"
    if end.state == "diverged":
        return f"has diverged ({end.reason}), and would again; remove its folder to start it anew"
    return None
