"""Pre-training, top to bottom: `torchrun -m simclr_dist.train CONFIG [--key value]`, or `python -m` for one process."""

import dataclasses
import hashlib
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import make_grid

from simclr_dist import checkpoint
from simclr_dist.atomic import write_atomically
from simclr_dist.config import Config, check_fits, load_config
from simclr_dist.data.draws import PRESETS, ViewSettings
from simclr_dist.data.order import Plan
from simclr_dist.data.reader import ShardDataset, StepDataset, load_steps, two_views
from simclr_dist.distributed import World, all_gather_objects, environment, on_rank_0, together, world
from simclr_dist.errors import ConfigError, DataError, DivergedError, RankError, UserError
from simclr_dist.export import export_encoder
from simclr_dist.learner import Learner, build_learner, step_metrics, training_step
from simclr_dist.monitor import Clock, Monitor
from simclr_dist.optim import learning_rate
from simclr_dist.run import open_run, recorded, truncate_metrics


def train(config: Config, here: World) -> None:
    """Train (or resume) the run that `config` names. Raises UserError or DivergedError."""
    images = together(lambda: ShardDataset(config.data.shards, open_shards=2 * config.data.window))
    check_fits(config, len(images), here.size)
    if len({str(seen) for seen in all_gather_objects((data_identity(images), config.to_dict()))}) > 1:
        raise ConfigError(f"data.shards: {config.data.shards!r}, or the config itself, is not the same on every rank")
    on_rank_0(lambda: open_run(config, {**environment(here), "data_digest": data_identity(images)}))
    with recorded(Path(config.run_folder), writer=here.is_main), ExitStack() as at_end:
        _train(config, here, images, at_end)


def _train(config: Config, here: World, images: ShardDataset, at_end: ExitStack) -> None:
    run, samples = Path(config.run_folder), len(images)
    settings = view_settings(config)
    learner = build_learner(config, here)
    total, warmup = config.total_steps(samples), config.warmup_steps(samples)
    step, bad_samples = resume(learner, config, here)
    if step > total:
        raise ConfigError(f"steps: the run in {run} has done {step} steps already, more than the {total} asked for")

    plan = Plan(
        images.manifest.shard_sizes,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        micro_batches=config.micro_batches,
        window=config.data.window,
        rank=here.rank,
        world_size=here.size,
    )
    steps = StepDataset(images, plan, settings, replace_bad=config.data.on_bad_sample == "replace")
    if here.is_main:
        truncate_metrics(run, step)
    monitor = Monitor(run, active=here.is_main, total_steps=total, first_step=step, tensorboard=config.log.tensorboard)
    at_end.callback(monitor.close)  # also after an error: TensorBoard's events wait in memory
    monitor.say(describe(config, plan, learner, here, settings, total, warmup, step))

    def save() -> None:
        if here.is_main:
            state = full_state(learner, config, here, step, bad_samples, data_identity(images))
            keep = config.checkpoint
            path = checkpoint.save(run / "checkpoints", step, state, keep_last=keep.keep_last, keep_every=keep.keep_every)
            monitor.say(f"step {step}: saved {path}")

    def export() -> None:
        if here.is_main:
            card = encoder_card(config, learner, settings, step, images.manifest.digest)
            export_encoder(run / "encoders" / f"step-{step:08d}.safetensors", learner.model.encoder, card)

    clock = Clock()
    for views in clock.waiting(
        load_steps(steps, range(step, total), workers=config.data.workers, pin_memory=here.device.type == "cuda")
    ):
        view_a, view_b = two_views(views, settings, here.device)
        if step == 0:
            monitor.images("views", _grid(view_a, view_b, settings), step)
        lr = learning_rate(step, peak=config.peak_lr, warmup_steps=warmup, total_steps=total)
        outcome = training_step(learner, view_a, view_b, config, lr)
        step += 1
        monitor.advance()
        for row, reason in views.bad:
            bad_samples[str(images.manifest.key[row])] = reason

        last = step == total
        if last or step % config.log.every == 0 or step % config.checkpoint.every == 0:
            share_bad_samples(bad_samples, config, run, here, monitor)
            metrics = step_metrics(outcome, learner, config, step, lr, len(bad_samples))
            if last or step % config.log.every == 0:
                monitor.log(step, metrics, clock.read(config.global_batch_size, total - step, here.device))
            if metrics["optim/longest_skip"] >= config.max_skipped_steps:
                before = step - metrics["optim/longest_skip"]  # what was saved since then has the same dead parameters
                good = [saved for saved in checkpoint.saved_steps(run / "checkpoints") if saved <= before]
                raise DivergedError(
                    f"step {step}: {config.max_skipped_steps} steps in a row were not finite; last good checkpoint:"
                    f" {run / 'checkpoints' / f'step-{good[-1]:08d}.pt' if good else 'none'};"
                    " lower optim.base_lr, in another run_folder"
                )
        if last or step % config.checkpoint.every == 0:
            save()
        if last or (config.checkpoint.export_every and step % config.checkpoint.export_every == 0):
            export()
    if not any((run / "encoders").glob(f"step-{step:08d}.safetensors")):
        export()  # killed between the last checkpoint and its encoder
    monitor.say(f"done: {step} steps; encoder {run / 'encoders' / f'step-{step:08d}.safetensors'}")


def data_identity(images: ShardDataset) -> str:
    """Names the images and their order: the same images cut into other shards are read in another order."""
    return hashlib.sha256(images.manifest.digest.encode() + images.manifest.shard_sizes.tobytes()).hexdigest()


def view_settings(config: Config) -> ViewSettings:
    """The preset with the config's own values put in."""
    own = {k: v for k, v in dataclasses.asdict(config.views).items() if k != "preset" and v is not None}
    return dataclasses.replace(PRESETS[config.views.preset], **own)


def full_state(
    learner: Learner, config: Config, here: World, step: int, bad_samples: dict[str, str], digest: str
) -> checkpoint.State:
    """What a checkpoint holds: tensors and plain values."""
    return {
        "format": 1,
        "step": step,
        "model": learner.model.state_dict(),
        "optimizer": learner.optimizer.state_dict(),
        "counters": {name: int(value) for name, value in learner.counters.items()},
        "init": learner.init,
        "bad_samples": dict(bad_samples),
        "data_digest": digest,
        "config": config.to_dict(),
        "environment": environment(here),
    }


def resume(learner: Learner, config: Config, here: World) -> tuple[int, dict[str, str]]:
    """Put the newest whole checkpoint into the learner; returns (steps done, bad samples so far)."""

    def report(line: str) -> None:
        if here.is_main:
            print(f"WARNING: {line}", file=sys.stderr, flush=True)

    state = together(lambda: checkpoint.load_newest(Path(config.run_folder) / "checkpoints", report=report))
    step = 0 if state is None else int(state["step"])
    if len(set(all_gather_objects(step))) > 1:
        raise DataError(
            f"run_folder: {config.run_folder!r}: the ranks see different checkpoints; put the run folder on a shared disk"
        )
    if state is None:
        return 0, {}
    learner.model.load_state_dict(state["model"])
    learner.optimizer.load_state_dict(state["optimizer"])
    for name, value in state["counters"].items():
        learner.counters[name].fill_(value)
    learner.init = state["init"]
    for name, old in state["environment"].items():
        if old != (new := environment(here)[name]):
            report(f"{name} was {old} and is {new}: the run goes on, and may differ from an uninterrupted one in the last bits")
    return step, dict(state["bad_samples"])


def share_bad_samples(bad: dict[str, str], config: Config, run: Path, here: World, monitor: Monitor) -> None:
    """Tell every rank of every unreadable image; beyond the limit the run ends, on all ranks alike."""
    if config.data.on_bad_sample == "error":
        return
    known = len(bad)
    for others in all_gather_objects(dict(bad)):
        bad.update(others)
    if len(bad) == known and known == 0:
        return
    lines = "".join(f"{reason}\n" for _, reason in sorted(bad.items()))
    if here.is_main:
        path = run / "bad_samples.txt"
        if not path.exists() or path.read_text() != lines:
            write_atomically(path, lines.encode())
            monitor.say(f"{len(bad)} unreadable images replaced so far, listed in {path}")
    if len(bad) > config.data.max_bad_samples:
        raise DataError(f"data.max_bad_samples: {len(bad)} unreadable images are too many, the last: {bad[max(bad)]}")


def encoder_card(config: Config, learner: Learner, settings: ViewSettings, step: int, digest: str) -> dict[str, Any]:
    """What someone who finds the encoder needs to know."""
    return {
        "encoder": config.model.encoder,
        "width": config.model.width,
        "stem": config.model.stem,
        "feature_size": learner.model.encoder.feature_size,
        "image_size": settings.image_size,
        "mean": list(settings.mean),
        "std": list(settings.std),
        "step": step,
        "images_seen": step * config.global_batch_size,
        "init": learner.init,
        "data_digest": digest,
        "config": config.to_dict(),
    }


def describe(
    config: Config,
    plan: Plan,
    learner: Learner,
    here: World,
    settings: ViewSettings,
    total: int,
    warmup: int,
    step: int,
) -> str:
    """What the run is, in the derived numbers that the config does not show."""
    parameters = sum(p.numel() for p in learner.model.parameters())
    batch, world_size = config.global_batch_size, here.size
    piece = batch // config.micro_batches
    return (
        f"{'resumed at step ' + str(step) if step else 'new run'}: {config.run_folder}\n"
        f"  data       {plan.samples} images, {plan.steps_per_epoch} steps an epoch, {plan.left_over} left over"
        " (others every epoch)\n"
        f"  batch      {batch} = {config.micro_batches} micro-batches x {world_size} ranks x {piece // world_size};"
        f" {2 * (batch - 1)} negatives an anchor; BatchNorm over {piece} images (both views)\n"
        f"  model      {config.model.encoder} width {config.model.width}, {parameters / 1e6:.2f} M parameters,"
        f" started from: {learner.init}; {config.precision} on {here.device.type}\n"
        f"  views      {settings}\n"
        f"  steps      {total} ({total / plan.steps_per_epoch:.1f} epochs), warm-up {warmup}, peak learning rate"
        f" {config.peak_lr:.4g} ({config.optim.name}, rule {config.optim.lr_rule})"
    )


def _grid(view_a: Tensor, view_b: Tensor, settings: ViewSettings) -> Tensor:
    pairs = torch.stack([view_a[:16], view_b[:16]], 1).flatten(0, 1).cpu()
    mean, std = torch.tensor(settings.mean).view(3, 1, 1), torch.tensor(settings.std).view(3, 1, 1)
    grid: Tensor = make_grid((pairs * std + mean).clamp(0, 1), nrow=8)
    return grid


def main(argv: Sequence[str]) -> int:
    """`CONFIG [--key value]`; returns the exit code."""
    speaks = os.environ.get("RANK", "0") == "0"
    try:
        if not argv or argv[0].startswith("-"):
            raise ConfigError("usage: python -m simclr_dist.train CONFIG [--key value ...]")
        config = load_config(argv[0], argv[1:])
        with world(config.device, config.timeout_minutes) as here:
            train(config, here)
    except UserError as error:
        if speaks or isinstance(error, RankError):
            print(f"simclr-dist: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(1)  # torchrun ends the other ranks once one has exited: let rank 0 speak first
        return 2
    except DivergedError as error:
        if speaks:
            print(f"simclr-dist: diverged: {error}", file=sys.stderr, flush=True)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
