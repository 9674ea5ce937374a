"""Find troubles in a run's logged numbers. They do not end the run."""

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Numbers = Mapping[str, float]

UNIFORMITY = -0.3  # 0 when all embeddings are one; -3 and below in runs that learn
EFFECTIVE_RANK = 1.5  # 1 when all embeddings lie on one line
GRADIENT_GROWTH = 10.0
WAIT_PERCENT = 30.0
LOCAL_RATIO = 1.5  # of the slowest rank's local work to that of the others; local work waits for no other rank
LOCAL_SHARE = 0.02  # least share of a step that this difference takes: local work is a small part of a step


class Patience(NamedTuple):
    """Time that a rule must hold to raise an alarm. It must fail as long to end one."""

    readings: int  # in a row
    steps: int  # from the first of them to the last


PATIENCE = {
    "collapse": Patience(5, 50),
    "divergence": Patience(3, 0),
    "above_chance": Patience(10, 100),
    "starving_loader": Patience(5, 20),
    "slow_rank": Patience(5, 20),
}


@dataclass(frozen=True)
class Alarm:
    """A trouble, with its likely cure."""

    kind: str  # a key of PATIENCE
    step: int  # at which it was raised
    why: str
    cure: str  # what likely helps


class Change(NamedTuple):
    """An alarm that was raised at `step`, or is over."""

    alarm: Alarm
    step: int
    over: bool

    @property
    def line(self) -> str:
        """Format the change as a line for people."""
        if self.over:
            return f"step {self.step}: over: {self.alarm.kind}, which began at step {self.alarm.step}"
        return f"ALARM step {self.step}: {self.alarm.kind}: {self.alarm.why}; likely cure: {self.alarm.cure}"


class Alarms:
    """Alarms of a run, from this start's first line on.

    collapse: embedding/uniformity above -0.3 or embedding/effective_rank below 1.5, once the warm-up is over or 200 steps are
    done. divergence: the gradient's norm is ten times its median over the twenty readings before while the loss is a tenth of
    its chance level above theirs; or there are more skipped steps, other than those by which fp16 finds its scale.
    above_chance: the loss above chance after the warm-up. starving_loader: some rank waits for data for more than 30 % of the
    time. slow_rank: the local work of one rank takes 1.5 times the median of the others, and a fiftieth of a step longer, and
    it is the same rank all the time: of many ranks one is always late. A rule must hold as long as PATIENCE says. Its alarm is
    raised once, and is over when the rule has failed as long.
    """

    def __init__(self, *, warmup_steps: int = 0, hosts: Sequence[str] = ()) -> None:
        self._warmup, self._hosts = warmup_steps, hosts
        self._active: dict[str, Alarm] = {}
        self._turning: dict[str, list[int]] = {kind: [] for kind in PATIENCE}  # steps of readings that speak for a change
        self._before: deque[tuple[float, float]] = deque(maxlen=20)  # gradient norm and loss of usual readings
        self._skipped: float | None = None
        self._slow = -1  # the rank that the rule of slow_rank has named last, or has an alarm for

    @property
    def active(self) -> list[Alarm]:
        """List the active alarms, oldest first."""
        return list(self._active.values())

    def see(self, step: int, metrics: Numbers, timing: Numbers) -> list[Change]:
        """Take the log of `step`; returns the changes. A rule whose numbers are missing does not hold."""
        rules = {
            "collapse": self._collapse(step, metrics),
            "divergence": self._divergence(metrics),
            "above_chance": self._above_chance(step, metrics),
            "starving_loader": self._starving_loader(timing),
            "slow_rank": self._slow_rank(timing),
        }
        changes = []
        for kind, seen in rules.items():
            if (seen is None) == (kind not in self._active):
                self._turning[kind] = []
                continue
            turning = self._turning[kind]
            turning.append(step)
            if len(turning) < PATIENCE[kind].readings or step - turning[0] < PATIENCE[kind].steps:
                continue
            self._turning[kind] = []
            if seen is None:
                changes.append(Change(self._active.pop(kind), step, True))
            else:
                self._active[kind] = Alarm(kind, step, *seen)
                changes.append(Change(self._active[kind], step, False))
        return changes

    def _collapse(self, step: int, metrics: Numbers) -> tuple[str, str] | None:
        uniformity = metrics.get("embedding/uniformity", -math.inf)
        rank = metrics.get("embedding/effective_rank", math.inf)
        if step < min(self._warmup, 200) or not (uniformity > UNIFORMITY or rank < EFFECTIVE_RANK):
            return None
        return (
            f"the embeddings are nearly all alike (uniformity {uniformity:.2f}, effective rank {rank:.1f})",
            "lower optim.base_lr or optim.weight_decay, or a longer warm-up, in another run_folder; what is learned from here"
            " on is of no use",
        )

    def _divergence(self, metrics: Numbers) -> tuple[str, str] | None:
        norm, loss = metrics.get("optim/gradient_norm", 0.0), _loss(metrics)
        skipped = metrics.get("optim/skipped_steps", 0.0)
        more_skipped = self._skipped is not None and skipped > self._skipped
        # At a scale above 1 fp16's gradient may overflow by the scale alone, which each such step lowers.
        more_skipped = more_skipped and not (math.isfinite(loss) and metrics.get("optim/loss_scale", 0.0) > 1)
        self._skipped = skipped
        cure = "a lower optim.base_lr, a longer warm-up, or a smaller optim.clip_norm, in another run_folder"
        if more_skipped:
            return f"steps are skipped, {skipped:.0f} so far, as loss or gradient is not finite", cure
        if len(self._before) >= 10:
            usual, usual_loss = map(statistics.median, zip(*self._before, strict=True))
            margin = 0.1 * metrics.get("loss/chance", math.inf)
            if not (norm <= GRADIENT_GROWTH * usual or loss <= usual_loss + margin):
                grew = f"the gradient's norm grew from {usual:.3g} to {norm:.3g}, the loss from {usual_loss:.3f} to {loss:.3f}"
                return grew, cure
        if math.isfinite(norm) and math.isfinite(loss):
            self._before.append((norm, loss))
        return None

    def _above_chance(self, step: int, metrics: Numbers) -> tuple[str, str] | None:
        loss, chance = _loss(metrics), metrics.get("loss/chance", math.inf)
        if step <= self._warmup or loss <= chance:
            return None
        return (
            f"the loss, {loss:.3f}, is above its level by chance, {chance:.3f}, long after the warm-up",
            "a lower optim.base_lr, or weaker views",
        )

    def _starving_loader(self, timing: Numbers) -> tuple[str, str] | None:
        wait = timing.get("ranks/data_wait_percent_max", 0.0)
        if wait <= WAIT_PERCENT:
            return None
        alone = wait > 2 * timing.get("speed/data_wait_percent", wait)
        where = f" on {self._name(timing['ranks/starving'])}" if alone else ""
        return (
            f"{wait:.0f} % of the time is spent waiting for images{where}",
            "more data.workers, smaller images (`simclr-dist shard --short-side`), or shards on a faster disk",
        )

    def _slow_rank(self, timing: Numbers) -> tuple[str, str] | None:
        local, others = timing.get("ranks/own_ms", 0.0), timing.get("ranks/own_ms_others", 0.0)
        if local <= LOCAL_RATIO * others or local - others <= LOCAL_SHARE * timing.get("speed/step_ms", math.inf):
            return None
        rank = int(timing["ranks/slowest"])
        if rank != self._slow:
            if "slow_rank" in self._active:
                return None
            self._slow, self._turning["slow_rank"] = rank, []
        return (
            f"{self._name(rank)} needs {local:.1f} ms a step for its own work, the others {others:.1f}, and all wait for it",
            "look there for another process, a throttled device or a slow disk; `simclr-dist train CONFIG --profile 3"
            f" --profile-rank {rank}` shows where its time goes",
        )

    def _name(self, rank: float) -> str:
        number = int(rank)
        return f"rank {number} ({self._hosts[number]})" if number < len(self._hosts) else f"rank {number}"


def _loss(metrics: Numbers) -> float:
    return metrics.get("loss/nt_xent", metrics.get("loss/dcl", -math.inf))
