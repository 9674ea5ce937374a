"""What a run shows of itself: `voice` (console, files), `board` (TensorBoard), `clock` (speed), `alarms` (what goes wrong)."""

from simclr_dist.monitor.clock import Clock, Stopwatch
from simclr_dist.monitor.voice import Monitor

__all__ = ["Clock", "Monitor", "Stopwatch"]
