"""Pre-train, top to bottom. Views -> z -> NT-Xent -> backward -> clip -> LARS at the scheduled rate -> log and save."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from simclr_dist.config.settings import Config
from simclr_dist.config.together import check_fits, check_machine, doubts
from simclr_dist.data.memory import held_in_memory
from simclr_dist.data.reader import ShardDataset
from simclr_dist.data.steps import StepDataset, Views, coloured, load_steps
from simclr_dist.data.views.colour import Colour
from simclr_dist.encoder.file import export_encoder
from simclr_dist.encoder.names import encoder_path
from simclr_dist.method.distributed import (
    World,
    all_equal,
    all_gather_objects,
    local_ranks,
    lost_ranks_named,
    on_rank_0,
    set_timeout,
    together,
)
from simclr_dist.method.loss import triton_problem
from simclr_dist.method.optim import learning_rate, step_unless
from simclr_dist.run import checkpoint
from simclr_dist.run.claim import Claim
from simclr_dist.run.folder import check_room, newest_step, open_run, truncate_metrics
from simclr_dist.run.loggers import chosen
from simclr_dist.run.status import record_event, record_start, recorded
from simclr_dist.run.steps import step_name
from simclr_dist.system import signals
from simclr_dist.system.errors import ConfigError, DivergedError, SaveError, StoppedError
from simclr_dist.train.agreement import StopAgreement, any_stop_signal, check_ranks_agree
from simclr_dist.train.describe import describe, encoder_card, run_card, view_grid, view_settings
from simclr_dist.train.images import RunImages, choose_colour, open_images, order
from simclr_dist.train.learner import (
    Learner,
    MicroBatch,
    backward,
    build_learner,
    embedding_size,
    kernel_problem,
    start_model,
    step_metrics,
)
from simclr_dist.train.monitor import Clock, Monitor
from simclr_dist.train.probe import OnlineProbe
from simclr_dist.train.profiling import Profile, profiled
from simclr_dist.train.state import (
    data_identity,
    full_state,
    learned_tensors,
    resume,
    saved_bytes,
    share_bad_samples,
    surroundings,
)


def train(config: Config, world: World, profile: Profile | None = None) -> None:
    """Train or resume the run that `config` names. `profile` names steps of this start.

    Raises UserError, DivergedError, and SaveError when a required write fails. Raises StoppedError after a stop signal; all
    work is saved by then.
    """
    if profile is not None:
        profile.check(world.size)
    images = together(lambda: open_images(config, world))
    together(lambda: check_fits(config, len(images), world.size, newest_step(Path(config.run_folder))))
    together(lambda: check_machine(config, view_settings(config).image_size, local_ranks(), world.size))
    digest = data_identity(images)
    if not all_equal((digest, config.to_dict())):
        raise ConfigError(f"data.shards: {config.data.shards!r}, or the config itself, is not the same on every rank")
    on_rank_0(lambda: check_room(config, config.total_steps(len(images)), *saved_bytes(config)))
    # Before there is a run folder, which would hold these settings.
    started = start_model(config, world, resumed=bool(checkpoint.saved_steps(Path(config.run_folder, "checkpoints"))))
    colour = together(lambda: choose_colour(config, world.device))
    slow = together(lambda: kernel_problem(config, embedding_size(config, started[0]), world))
    probe = None
    if config.probe.every_epochs:
        assert isinstance(images, ShardDataset), "checked"
        steps = config.steps_per_epoch(len(images))
        probe = OnlineProbe(config, view_settings(config), images.manifest, world, steps_per_epoch=steps)
    claim = on_rank_0(lambda: open_run(config, {**surroundings(world), "data_digest": digest}))
    with recorded(Path(config.run_folder), claim), lost_ranks_named():
        trainer = Trainer(config, world, images, claim, build_learner(config, world, started), colour, probe)
        with closing(trainer.monitor):
            trainer.introduce(slow)
            trainer.loop(profile)
            trainer.finish()


def training_step(
    learner: Learner, micro_batches: Sequence[MicroBatch], config: Config, lr: float,
    *, rows: Sequence[Tensor] = (), step: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """Update the parameters by this rank's micro-batches. A non-finite loss or gradient changes nothing.

    `rows` and `step` key the draws of random layers, as of `backward`. No host sync of ours. All ranks decide alike: the loss
    is that of the global batch, and the gradient is averaged already.
    """
    parameters, optimizer = list(learner.model.parameters()), learner.optimizer
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    buffers = [buffer for buffer in learner.model.buffers() if buffer.is_floating_point()]
    before = torch.cat([buffer.flatten() for buffer in buffers]) if buffers else None
    loss, z_a, z_b = backward(learner, micro_batches, rows=rows, step=step)  # z of all ranks, NT-Xent, and the mean gradient
    with learner.local_timer, record_function("optimizer"):
        if learner.loss_scale:
            loss = learner.loss_scale.unscale(loss, parameters)
        clip_norm = config.optim.clip_norm or torch.inf
        norm = nn.utils.clip_grad_norm_(parameters, clip_norm)
        bad = ~(loss.isfinite() & norm.isfinite())
        step_unless(optimizer, bad)  # LARS
        if before is not None:  # a non-finite batch must not stay in the running statistics
            kept = torch.where(bad, before, torch.cat([buffer.flatten() for buffer in buffers]))
            parts = zip(kept.split([buffer.numel() for buffer in buffers]), buffers, strict=True)
            torch._foreach_copy_(buffers, [part.view_as(buffer) for part, buffer in parts])
        learner.count_step(loss, bad, clipped=norm > clip_norm)
    return {"loss": loss, "gradient_norm": norm, "z_a": z_a, "z_b": z_b}


class Trainer:
    """One start of a run on one rank.

    Most methods hold collectives, so every rank calls the same ones in the same order. `claim` is rank 0's right to write;
    the other ranks have None and write nothing.
    """

    def __init__(
        self, config: Config, world: World, images: RunImages, claim: Claim | None, learner: Learner, colour: Colour,
        probe: OnlineProbe | None,
    ) -> None:  # fmt: skip
        self.config, self.world, self.images, self.claim = config, world, images, claim
        self.learner, self.colour, self.probe = learner, colour, probe
        self.folder, self.of_images = Path(config.run_folder), {"images": len(images), "data_digest": images.digest}
        self.view_settings = view_settings(config)
        self.total, self.warmup = config.total_steps(len(images)), config.warmup_steps(len(images))
        self.step, self.bad_samples = resume(self.learner, config, world, len(images), data_identity(images))
        self.first = self.step  # steps that were done before this start
        self.longest_skip = torch.zeros_like(learner.counters["longest_skip"])  # that this start has seen
        on_rank_0(self._begin)  # it may find the disk full
        self.plan = order(config, images, world, self.step)
        self.agreement = StopAgreement(world.device)
        in_memory = config.data.in_memory if self.step < self.total else "never"
        source = held_in_memory(images, in_memory, self._end_if_stopped_early)
        self.agreement.finish()
        self.dataset = StepDataset(source, self.plan, self.view_settings, replace_bad=config.data.on_bad_sample == "replace")
        self.clock = Clock(world.device, self.learner.local_timer)
        self.checkpoint_seconds = 0.0
        self.monitor = Monitor(
            self.folder,
            active=world.is_main,
            total_steps=self.total,
            first_step=self.step,
            tensorboard=config.log.tensorboard,
            loggers=chosen(config),
            warmup_steps=self.warmup,
            hosts=self.clock.hosts,
            start=claim.generation if claim else None,
        )

    def loop(self, profile: Profile | None) -> None:
        """Take the remaining steps. Log, check and save when due."""
        config, learner = self.config, self.learner
        if (stop := any_stop_signal(signals.requested())) and self.step < self.total:
            raise StoppedError(f"{signals.name(stop)} before the first step")
        for views in self._views_of_steps(profile):
            device, timer = self.world.device, learner.local_timer
            micro_batches = coloured(views, self.view_settings, device, colour=self.colour, timed=timer)
            self._show(micro_batches)
            lr = learning_rate(self.step, peak=config.peak_lr, warmup_steps=self.warmup, total_steps=self.total)
            outcome = training_step(learner, micro_batches, config, lr, rows=views.rows_of_each, step=self.step)
            del micro_batches  # before the next ones are made
            self.step += 1
            stop = self.agreement.exchange(signals.requested())
            self._note_step(views)

            last = self.step == self.total
            must_save = last or bool(stop)
            save_due = must_save or self._is_due(config.checkpoint.every)
            export_due = last or self._is_due(config.checkpoint.export_every)
            probe_due = self.probe is not None and self.probe.is_due(self.step)
            log_due = last or probe_due or self._is_due(config.log.every)
            if log_due or save_due:
                share_bad_samples(self.bad_samples, config, self.folder, self.world, self.monitor)
                if log_due:
                    self._log(outcome, lr, probe_due)
                self._end_if_diverged()
            if save_due or self._is_due(config.check_ranks_every):
                check_ranks_agree(learned_tensors(learner), self.step)
            self._write([self._save] * save_due + [self._export] * export_due, required=must_save)
            if stop and not last:
                self.agreement.finish()
                raise StoppedError(signals.name(stop))

    def introduce(self, problem: str) -> None:
        """Describe the run in text and pictures. `problem`: why this rank lacks its kernels, or ''."""
        unfinished, config = self.step < self.total, self.config
        described = describe(config, self.plan, self.learner, self.world, self.step)
        if unfinished:
            self.monitor.say(described)
            short_side = self.images.manifest.short_side if isinstance(self.images, ShardDataset) else None
            on_cpu, side = self.world.device.type == "cpu", self.view_settings.image_size
            for doubt in doubts(config, len(self.images), self.world.size, side, short_side, on_cpu=on_cpu):
                self.monitor.say(f"WARNING: {doubt}")
            if self.world.device.type == "cuda":
                problem = triton_problem(self.world.device)  # found when colour was chosen, which needs it in any case
            for why in sorted(set(all_gather_objects(problem)) - {""}):
                self.monitor.say(f"WARNING: colour and loss are computed by plain torch operations, which are slower: {why}")
        self.monitor.card(run_card(config, described))
        if self.probe is not None and unfinished:
            self.monitor.say(f"  probe      {self.probe}")

    def finish(self) -> None:
        """Export the last encoder if a kill prevented it. Say where it is."""
        self.agreement.finish()
        encoder = encoder_path(self.folder, self.step)
        # Killed between the last checkpoint and its encoder. What rank 0 sees decides: another may come late.
        self._write([self._export] * (not encoder.exists()), required=True)
        already = " already" if self.first == self.total else ""
        self.monitor.say(f"done{already}: {self.step} steps; encoder {encoder}")

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _begin(self) -> None:
        assert self.claim is not None, "only rank 0 begins"
        record_start(self.claim, self.step, self.world.size, self.total)
        truncate_metrics(self.folder, self.step)

    def _end_if_stopped_early(self) -> None:
        """Raise StoppedError at a stop signal while images are decoded. Every rank must call it equally often."""
        if stop := self.agreement.exchange(signals.requested()):
            self.agreement.finish()
            raise StoppedError(f"{signals.name(stop)} before the first step")

    def _views_of_steps(self, profile: Profile | None) -> Iterator[Views]:
        """Load this rank's views of the remaining steps, ahead of time."""
        steps, pin = range(self.step, self.total), self.world.device.type == "cuda"
        minutes = self.config.first_step_timeout_minutes, self.config.timeout_minutes
        views = load_steps(self.dataset, steps, workers=self.config.data.workers, pin_memory=pin, minutes=minutes)
        loaded = self.clock.waiting(views)
        return profiled(loaded, profile, self.folder / "profile", self.world, done=self.step, total=self.total)

    def _show(self, micro_batches: Sequence[MicroBatch]) -> None:
        if self.step == 0 or self._is_due(self.config.log.views_every_epochs * self.plan.steps_per_epoch):
            self.monitor.images("views", view_grid(*micro_batches[0], self.view_settings), self.step)

    def _note_step(self, views: Views) -> None:
        """Give a sign of life. Keep the step's unreadable images, and how long steps have been skipped."""
        self.longest_skip = torch.maximum(self.longest_skip, self.learner.counters["skipped_in_a_row"])
        if self.step == self.first + 1:
            set_timeout(self.config.timeout_minutes)
        if self.claim is not None:
            self.claim.beat(self.step)
        self.monitor.advance()
        for row, reason in views.bad:
            self.bad_samples[self.images.bad_sample(row, reason)] = reason

    def _log(self, outcome: dict[str, Tensor], lr: float, probe_due: bool) -> None:
        metrics = step_metrics(outcome, self.learner, self.config, self.step, lr, len(self.bad_samples))
        if self.probe is not None and probe_due:
            metrics |= self.probe.measure(self.learner.model)
        timing = self.clock.read(self.config.global_batch_size, self.total - self.step)
        timing["run/restarts"] = 0.0 if self.claim is None else self.claim.generation - 1
        timing["run/checkpoint_seconds"] = self.checkpoint_seconds
        self.monitor.log(self.step, metrics, timing, (outcome["z_a"], outcome["z_b"]))

    def _end_if_diverged(self) -> None:
        if (skipped := int(self.longest_skip)) < self.config.max_skipped_steps:
            return
        checkpoints = self.folder / "checkpoints"
        # Checkpoints of the skipped steps hold the same dead parameters.
        good = [step for step in checkpoint.saved_steps(checkpoints) if step <= self.step - skipped]
        raise DivergedError(
            f"step {self.step}: {self.config.max_skipped_steps} steps in a row were not finite; last good checkpoint:"
            f" {checkpoints / step_name(good[-1], '.pt') if good else 'none'}; lower optim.base_lr, in another run_folder"
        )

    def _save(self) -> None:
        if self.claim is None:
            return
        began, digest = time.perf_counter(), data_identity(self.images)
        state = full_state(self.learner, self.config, self.world, self.step, self.bad_samples, digest)
        state["images"] = self.of_images
        folder, keep, allowed = self.folder / "checkpoints", self.config.checkpoint, self.claim.check
        path = checkpoint.save(folder, self.step, state, keep_last=keep.keep_last, keep_every=keep.keep_every, allowed=allowed)
        self.checkpoint_seconds = time.perf_counter() - began
        self.monitor.say(f"step {self.step}: saved {path}")

    def _export(self) -> None:
        if self.claim is None:
            return
        model, path = self.learner.model, encoder_path(self.folder, self.step)
        card = encoder_card(self.config, model.encoder.feature_size, self.learner.init, self.step, self.of_images)
        at_end = self.step == self.total > self.first
        elsewhere = (Path.cwd(), tempfile.gettempdir()) if at_end else ()  # it is what all the steps were for
        export_encoder(path, model.encoder, card, model.projector, elsewhere=elsewhere)
        if self.step < self.total:  # else the last line names it
            self.monitor.say(f"step {self.step}: exported {path}")

    def _write(self, writes: Sequence[Callable[[], None]], *, required: bool) -> None:
        """Do each of `writes`. If `required`, every rank waits until they are on disk, or raises SaveError."""

        def all_of_them() -> None:
            failed = []
            for write in writes:  # a smaller file may fit
                try:
                    write()
                except SaveError as error:
                    failed.append(error)
            if failed:
                encoder = encoder_path(self.folder, self.step)
                more = [failed[0].more, *map(str, failed[1:]), *[f"the encoder is {encoder}"] * encoder.exists()]
                raise SaveError(failed[0].path, failed[0].cause, "; ".join(more))

        if required:
            on_rank_0(all_of_them)
            return
        try:
            all_of_them()
        except SaveError as error:  # the next one may find room
            saved = checkpoint.saved_steps(self.folder / "checkpoints")
            whole = "training goes on, and the last checkpoints are whole"
            line = whole if saved else "training goes on without any checkpoint: a crash costs all of it"
            self.monitor.say(f"WARNING: step {self.step}: {error}; {line}")
            record_event(self.folder, "save_failed", step=self.step, why=str(error))
