"""Pre-training, top to bottom."""

import time
from contextlib import ExitStack
from pathlib import Path

from simclr_dist.config.settings import Config
from simclr_dist.config.together import check_fits
from simclr_dist.data.memory import held_in_memory
from simclr_dist.data.reader import ShardDataset
from simclr_dist.data.steps import StepDataset, coloured, load_steps
from simclr_dist.encoder.file import export_encoder
from simclr_dist.method.distributed import World, all_gather_objects, environment, on_rank_0, set_timeout, together
from simclr_dist.method.optim import learning_rate
from simclr_dist.run import checkpoint
from simclr_dist.run import claim as ledger
from simclr_dist.run.folder import open_run, recorded, truncate_metrics
from simclr_dist.system import signals
from simclr_dist.system.errors import ConfigError, DivergedError, SaveError, StoppedError
from simclr_dist.train.agreement import StopAgreement, any_asked, check_ranks_agree
from simclr_dist.train.describe import describe, encoder_card, run_card, view_grid, view_settings
from simclr_dist.train.images import RunImages, open_images, order
from simclr_dist.train.learner import build_learner, step_metrics, training_step
from simclr_dist.train.monitor import Clock, Monitor
from simclr_dist.train.probe import OnlineProbe
from simclr_dist.train.profiling import Profile, profiled
from simclr_dist.train.state import data_identity, full_state, learned_tensors, resume, share_bad_samples


def train(config: Config, here: World, profile: Profile | None = None) -> None:
    """Train (or resume) the run that `config` names; `profile` some steps of this start.

    Raises UserError, DivergedError, SaveError when what must be saved cannot be, and StoppedError after a stop signal, when
    all that was done is saved.
    """
    images = together(lambda: open_images(config, here))
    check_fits(config, len(images), here.size)
    if len({str(seen) for seen in all_gather_objects((data_identity(images), config.to_dict()))}) > 1:
        raise ConfigError(f"data.shards: {config.data.shards!r}, or the config itself, is not the same on every rank")
    claims: list[ledger.Claim] = []  # rank 0's, which stays there
    on_rank_0(lambda: claims.append(open_run(config, {**environment(here), "data_digest": data_identity(images)})))
    claim = claims[0] if claims else None
    with recorded(Path(config.run_folder), claim), ExitStack() as at_end:
        _train(config, here, images, claim, at_end, profile)


def _train(
    config: Config,
    here: World,
    images: RunImages,
    claim: ledger.Claim | None,
    at_end: ExitStack,
    profile: Profile | None,
) -> None:
    run, samples = Path(config.run_folder), len(images)
    settings = view_settings(config)
    learner = build_learner(config, here)
    total, warmup = config.total_steps(samples), config.warmup_steps(samples)
    step, bad_samples = resume(learner, config, here, total)
    if step > total:
        raise ConfigError(f"steps: the run in {run} has done {step} steps already, more than the {total} asked for")
    done_before = step == total

    def begin() -> None:
        if claim is not None:
            claim.started(step, here.size)
            truncate_metrics(run, step)

    on_rank_0(begin)  # it may find the disk full

    plan = order(config, images, here, step)
    agreement = StopAgreement(here.device)

    def stop_when_asked() -> None:
        if asked := agreement.exchange(signals.asked()):
            agreement.finish()
            raise StoppedError(f"{signals.name(asked)} before the first step")

    source = held_in_memory(images, config.data.in_memory if step < total else "never", stop_when_asked)
    agreement.finish()
    steps = StepDataset(source, plan, settings, replace_bad=config.data.on_bad_sample == "replace")
    clock, first = Clock(here.device, learner.own_work), step + 1
    monitor = Monitor(
        run,
        active=here.is_main,
        total_steps=total,
        first_step=step,
        tensorboard=config.log.tensorboard,
        warmup_steps=warmup,
        hosts=clock.hosts,
    )
    at_end.callback(monitor.close)
    described = describe(config, plan, learner, here, settings, total, warmup, step)
    if not done_before:
        monitor.say(described)
    monitor.card(run_card(config, described))
    probe = None
    if config.probe.every_epochs:
        assert isinstance(images, ShardDataset), "checked"
        probe = OnlineProbe(config, settings, images.manifest, here, steps_per_epoch=plan.steps_per_epoch)
        if not done_before:
            monitor.say(f"  probe      {probe}")
    of_run = {"run/restarts": 0.0 if claim is None else claim.generation - 1, "run/checkpoint_seconds": 0.0}

    def save() -> None:
        if claim is not None:
            began = time.perf_counter()
            state = full_state(learner, config, here, step, bad_samples, data_identity(images))
            keep = config.checkpoint
            path = checkpoint.save(
                run / "checkpoints", step, state, keep_last=keep.keep_last, keep_every=keep.keep_every, allowed=claim.check
            )
            of_run["run/checkpoint_seconds"] = time.perf_counter() - began
            monitor.say(f"step {step}: saved {path}")

    def export() -> None:
        if claim is not None:
            card = encoder_card(config, learner, settings, step, images.digest)
            path = run / "encoders" / f"step-{step:08d}.safetensors"
            export_encoder(path, learner.model.encoder, card, learner.model.projector)
            if step < total:  # else the last line names it
                monitor.say(f"step {step}: exported {path}")

    views_every = config.log.views_every_epochs * plan.steps_per_epoch
    asked = any_asked(signals.asked())
    if asked and step < total:
        raise StoppedError(f"{signals.name(asked)} before the first step")
    loaded = load_steps(steps, range(step, total), workers=config.data.workers, pin_memory=here.device.type == "cuda")
    for views in profiled(clock.waiting(loaded), profile, run / "profile", here, done=step, total=total):
        pieces = coloured(views, settings, here.device, timed=learner.own_work)
        if step == 0 or (views_every and step % views_every == 0):
            monitor.images("views", view_grid(*pieces[0], settings), step)
        lr = learning_rate(step, peak=config.peak_lr, warmup_steps=warmup, total_steps=total)
        outcome = training_step(learner, pieces, config, lr)
        del pieces  # before the next ones are made
        step += 1
        asked = agreement.exchange(signals.asked())
        if step == first:
            set_timeout(config.timeout_minutes)
        if claim is not None:
            claim.beat(step)
        monitor.advance()
        for row, reason in views.bad:
            bad_samples[images.bad_sample(row, reason)] = reason

        last = step == total
        must_save = last or bool(asked)
        probe_now = probe is not None and probe.is_due(step)
        save_now = must_save or step % config.checkpoint.every == 0
        log_now = last or probe_now or step % config.log.every == 0
        if log_now or save_now:
            share_bad_samples(bad_samples, config, run, here, monitor)
            if log_now:
                metrics = step_metrics(outcome, learner, config, step, lr, len(bad_samples))
                if probe is not None and probe_now:
                    metrics |= probe.measure(learner.model)
                timing = clock.read(config.global_batch_size, total - step) | of_run
                monitor.log(step, metrics, timing, (outcome["z_a"], outcome["z_b"]))
            if (skipped := int(learner.counters["longest_skip"])) >= config.max_skipped_steps:
                before = step - skipped  # what was saved since then has the same dead parameters
                good = [saved for saved in checkpoint.saved_steps(run / "checkpoints") if saved <= before]
                raise DivergedError(
                    f"step {step}: {config.max_skipped_steps} steps in a row were not finite; last good checkpoint:"
                    f" {run / 'checkpoints' / f'step-{good[-1]:08d}.pt' if good else 'none'};"
                    " lower optim.base_lr, in another run_folder"
                )
        if save_now or (config.check_ranks_every and step % config.check_ranks_every == 0):
            check_ranks_agree(learned_tensors(learner), step)
        writes = [save] if save_now else []
        if last or (config.checkpoint.export_every and step % config.checkpoint.export_every == 0):
            writes.append(export)
        if must_save:
            for write in writes:
                on_rank_0(write)  # no rank leaves before it is on disk
        else:
            try:
                for write in writes:
                    write()
            except SaveError as error:  # the next one may find room
                monitor.say(f"WARNING: step {step}: {error}; training goes on, and the last checkpoints are whole")
                ledger.record(run, "save_failed", step=step, why=str(error))
        if asked and not last:
            agreement.finish()
            raise StoppedError(signals.name(asked))
    agreement.finish()
    if not any((run / "encoders").glob(f"step-{step:08d}.safetensors")):
        on_rank_0(export)  # killed between the last checkpoint and its encoder
    monitor.say(
        f"done{' already' if done_before else ''}: {step} steps; encoder {run / 'encoders' / f'step-{step:08d}.safetensors'}"
    )
