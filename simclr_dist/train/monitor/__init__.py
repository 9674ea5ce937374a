"""What a run shows of itself: `voice` (console, files), `board` (TensorBoard), `clock` (speed), `alarms` (what goes wrong)."""

from simclr_dist.train.monitor.clock import Clock, Stopwatch
from simclr_dist.train.monitor.voice import Monitor

__all__ = ["Clock", "Monitor", "Stopwatch"]
