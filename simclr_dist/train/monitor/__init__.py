"""Show a run: `voice` (console, files), `board` (TensorBoard), `clock` (speed) and `alarms`."""

from simclr_dist.train.monitor.clock import Clock, Stopwatch
from simclr_dist.train.monitor.voice import Monitor

__all__ = ["Clock", "Monitor", "Stopwatch"]
