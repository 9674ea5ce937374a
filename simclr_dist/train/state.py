"""Move a run's state into a checkpoint and back. Share among ranks what they must know of the data."""

import hashlib
import sys
from pathlib import Path

from torch import Tensor

from simclr_dist.config.settings import Config
from simclr_dist.data.stream import StreamImages
from simclr_dist.method.distributed import World, all_equal, all_gather_objects, environment, together
from simclr_dist.run import checkpoint
from simclr_dist.system.errors import DataError
from simclr_dist.system.files import write_atomically
from simclr_dist.train.images import RunImages
from simclr_dist.train.learner import Learner
from simclr_dist.train.monitor import Monitor


def data_identity(images: RunImages) -> str:
    """Return a digest of the images and their order. The same images in other shards are read in another order."""
    if isinstance(images, StreamImages):
        return images.digest
    return hashlib.sha256(images.manifest.digest.encode() + images.manifest.shard_sizes.tobytes()).hexdigest()


def full_state(
    learner: Learner, config: Config, world: World, step: int, bad_samples: dict[str, str], digest: str
) -> checkpoint.State:
    """Gather what a checkpoint holds: tensors and plain values."""
    return {
        "step": step,
        "model": learner.model.state_dict(),
        "optimizer": learner.optimizer.state_dict(),
        "loss_scale": learner.loss_scale.state() if learner.loss_scale else None,
        "counters": {name: int(value) for name, value in learner.counters.items()},
        "init": learner.init,
        "bad_samples": dict(bad_samples),
        "data_digest": digest,
        "config": config.to_dict(),
        "environment": environment(world),
    }


def learned_tensors(learner: Learner) -> dict[str, Tensor]:
    """Name the tensors that every rank has: parameters, buffers, optimizer state."""
    tensors: dict[str, Tensor] = dict(learner.model.state_dict())
    for number, state in enumerate(learner.optimizer.state.values()):
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer state {number} {name}"] = value.to(next(learner.model.parameters()).device)
    return tensors


def resume(learner: Learner, config: Config, world: World, total_steps: int) -> tuple[int, dict[str, str]]:
    """Load the newest whole checkpoint into the learner. Returns (steps done, bad samples so far).

    If steps are left, standard error shows what differs in the environment.
    """

    def report(line: str) -> None:
        if world.is_main:
            print(f"WARNING: {line}", file=sys.stderr, flush=True)

    state = together(lambda: checkpoint.load_newest(Path(config.run_folder) / "checkpoints", report=report))
    step = 0 if state is None else int(state["step"])
    if not all_equal(step):
        raise DataError(
            f"run_folder: {config.run_folder!r}: the ranks see different checkpoints; put the run folder on a shared disk"
        )
    if state is None:
        return 0, {}
    learner.model.load_state_dict(state["model"])
    learner.optimizer.load_state_dict(state["optimizer"])
    if learner.loss_scale and (saved := state.get("loss_scale")):
        learner.loss_scale.restore(saved)
    for name, value in state["counters"].items():
        learner.counters[name].fill_(value)
    learner.init = state["init"]
    for name, old in state["environment"].items():
        if old != (new := environment(world)[name]) and step < total_steps:
            report(f"{name} was {old} and is {new}: the run goes on, and may differ from an uninterrupted one in the last bits")
    return step, dict(state["bad_samples"])


def share_bad_samples(bad: dict[str, str], config: Config, run: Path, world: World, monitor: Monitor) -> None:
    """Put every rank's unreadable images into `bad` and list them. Too many raise DataError on all ranks."""
    if config.data.on_bad_sample == "error":
        return
    for others in all_gather_objects(dict(bad)):
        bad.update(others)
    if not bad:
        return
    lines = "".join(f"{reason}\n" for _, reason in sorted(bad.items()))
    if world.is_main:
        path = run / "bad_samples.txt"
        if not path.exists() or path.read_text() != lines:
            try:
                write_atomically(path, lines.encode())
            except OSError as error:
                monitor.say(f"WARNING: {path}: {error.strerror}")
            monitor.say(f"{len(bad)} unreadable images replaced so far, listed in {path}")
    if len(bad) > config.data.max_bad_samples:
        raise DataError(f"data.max_bad_samples: {len(bad)} unreadable images are too many, the last: {bad[max(bad)]}")
