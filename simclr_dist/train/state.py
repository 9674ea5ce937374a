"""Move a run's state into a checkpoint and back. Share among ranks what they must know of the data."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simclr_dist.config.load import config_from_dict
from simclr_dist.config.settings import Config
from simclr_dist.data.pixels.decode import describe_decoders
from simclr_dist.data.stream import StreamImages
from simclr_dist.encoder.file import export_encoder
from simclr_dist.method.distributed import World, all_equal, all_gather_objects, environment, together
from simclr_dist.method.optim import numbers_kept
from simclr_dist.run import checkpoint
from simclr_dist.run.folder import check_same_images
from simclr_dist.run.steps import step_name
from simclr_dist.system.errors import DataError, reason_of, say
from simclr_dist.system.files import fitting, write_atomically
from simclr_dist.train.describe import encoder_card, rate_doubt
from simclr_dist.train.images import RunImages
from simclr_dist.train.learner import Learner, build_model, build_shapes
from simclr_dist.train.monitor import Monitor


def data_identity(images: RunImages) -> str:
    """Return what a resumed run must find again."""
    return images.digest if isinstance(images, StreamImages) else images.manifest.identity


def surroundings(world: World) -> dict[str, Any]:
    """List what pixels, bits and speed depend on beside the config."""
    return {**environment(world), "decoder": describe_decoders()}


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
        "environment": surroundings(world),
    }


def saved_bytes(config: Config) -> tuple[float, float]:
    """Return the bytes of a checkpoint, and of an encoder with projector. At least, where the optimizer's are not known."""
    model = build_shapes(config)
    weights = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    copies = numbers_kept(config.optim.name, config.optim.momentum) or 0
    # An encoder leaves as float32, whatever it was trained in.
    return float(weights * config.number_bytes * (1 + copies) + buffers), float(4 * weights + buffers)


def learned_tensors(learner: Learner) -> dict[str, Tensor]:
    """Name the tensors that every rank has: parameters, buffers, optimizer state."""
    tensors: dict[str, Tensor] = dict(learner.model.state_dict())
    for number, state in enumerate(learner.optimizer.state.values()):
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer state {number} {name}"] = value.to(next(learner.model.parameters()).device)
    return tensors


def resume(learner: Learner, config: Config, world: World, samples: int, digest: str) -> tuple[int, dict[str, str]]:
    """Load the newest whole checkpoint into the learner. Returns (steps done, bad samples so far).

    If steps are left, standard error shows what differs in the environment and in the rate. Raises DataError for a checkpoint
    that does not fit the learner, ConfigError for one of other images than `digest` names.
    """
    folder = Path(config.run_folder) / "checkpoints"

    def report(line: str) -> None:
        if world.is_main:
            say(line, "WARNING: ")

    state = together(lambda: checkpoint.load_newest(folder, report=report))
    step = 0 if state is None else int(state["step"])
    if not all_equal(step):
        raise DataError(
            f"run_folder: {config.run_folder!r}: the ranks see different checkpoints; put the run folder on a shared disk"
        )
    if state is None:
        return 0, {}
    check_same_images(config, state.get("data_digest"), digest)
    together(lambda: _restore(learner, state, folder / step_name(step, ".pt")))
    if step >= config.total_steps(samples):
        return step, dict(state["bad_samples"])
    for name, new in surroundings(world).items():
        is_free = name == "world_size" and config.deterministic == "exact"
        if (old := state["environment"].get(name, new)) != new and not is_free:
            report(f"{name} was {old} and is {new}: the run goes on, and may differ from an uninterrupted one in the last bits")
    if doubt := rate_doubt(config_from_dict(state["config"], str(folder / step_name(step, ".pt"))), config, samples, step):
        report(doubt)
    return step, dict(state["bad_samples"])


def export_checkpoint(path: Path, out: Path) -> Path:
    """Write a checkpoint's encoder to `out`, as its run would have. Returns that. Raises DataError for what is none."""
    state = checkpoint.load(path)
    try:
        fitting(state, {"config": dict, "model": dict, "init": str, "images?": dict})
        images = fitting(state.get("images", {"data_digest": None}), {"images?": int, "data_digest": str | None})
        config = config_from_dict(state["config"], str(path))
        model = build_model(config)
        model.load_state_dict(state["model"])
    except (LookupError, ValueError, RuntimeError) as error:
        raise DataError(f"{path}: does not fit its own settings ({reason_of(error)})") from None
    card = encoder_card(config, model.encoder.feature_size, state["init"], state["step"], images)
    export_encoder(out, model.encoder, card, model.projector)
    return out


def _restore(learner: Learner, state: checkpoint.State, path: Path) -> None:
    """Put a checkpoint's state into the learner. Raises DataError where it does not fit."""
    try:
        parts = dict.fromkeys(("model", "optimizer", "counters", "bad_samples", "environment"), dict)
        fitting(state, parts | {"init": str})
        fitting(state["bad_samples"], dict.fromkeys(state["bad_samples"], str))
        counters = fitting(state["counters"], {f"{name}?": int for name in learner.counters})
        _check_tensors(learner, state)
        keys = [set(group) for group in learner.optimizer.param_groups]
        learner.optimizer.load_state_dict(state["optimizer"])
        for before, group in zip(keys, learner.optimizer.param_groups, strict=True):
            if missing := before - set(group):
                raise ValueError(f"optimizer: {min(missing)} is missing")
        if learner.loss_scale and (scale := state.get("loss_scale")):
            learner.loss_scale.restore(scale)
            _check_tensor("loss_scale", learner.loss_scale.factor, learner.loss_scale.factor)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise checkpoint.misfit(path, f"does not fit this run ({reason_of(error)})") from None
    learner.model.load_state_dict(state["model"])
    for name, counter in learner.counters.items():
        counter.fill_(counters.get(name, 0))
    learner.init = state["init"]


def _check_tensors(learner: Learner, state: checkpoint.State) -> None:
    """Raise ValueError where a tensor is not as the learner's."""
    model, saved, optimizer = learner.model.state_dict(), state["model"], state["optimizer"]
    if strange := model.keys() ^ saved.keys():
        raise ValueError(f"model: {min(strange)} is missing on one side")
    for name, now in model.items():
        _check_tensor(f"model: {name}", saved[name], now)
    parameters = [parameter for group in learner.optimizer.param_groups for parameter in group["params"]]
    third_party = "torch_optimizer" in type(learner.optimizer).__module__  # some keep matrices of other shapes
    numbers = [number for group in optimizer["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        for name, then in optimizer["state"].get(number, {}).items():
            if isinstance(then, Tensor) and not third_party:
                _check_tensor(f"optimizer: {name}", then, parameter if then.dim() else then)  # a count has no dimensions


def _check_tensor(name: str, then: Any, now: Tensor) -> None:
    if not isinstance(then, Tensor) or (then.shape, then.dtype) != (now.shape, now.dtype):
        kind = f"{list(then.shape)} {then.dtype}" if isinstance(then, Tensor) else type(then).__name__
        raise ValueError(f"{name} is {kind}, here {list(now.shape)} {now.dtype}")
    if not torch.isfinite(then).all():
        raise ValueError(f"{name} holds numbers that are not finite")


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
        try:
            new = not path.exists() or path.read_bytes() != lines.encode()
            if new:
                write_atomically(path, lines.encode())
        except OSError as error:
            new = True
            monitor.say(f"WARNING: {path}: {error.strerror}")
        if new:
            monitor.say(f"{len(bad)} unreadable images replaced so far, listed in {path}")
    if len(bad) > config.data.max_bad_samples:
        raise DataError(f"data.max_bad_samples: {len(bad)} unreadable images are too many, the last: {bad[max(bad)]}")
