"""Define a plan's settings, with their ranges. Quick to import."""

from dataclasses import dataclass

from simclr_dist.config.ranges import Count, Positive, Share, check_ranges
from simclr_dist.config.settings import Config
from simclr_dist.preflight.plan import hardware
from simclr_dist.system.errors import ConfigError


@dataclass(frozen=True)
class PlanSettings:
    """Settings of a plan; raises ConfigError for a value out of range."""

    processes: Count = 1
    """Ranks in all."""
    samples: Count | None = None
    """Images in the data set, when its shards are not here."""
    gpu: str | None = None
    """GPU by name (h100, a100-40, v100-16, ...), or its memory alone, like 24GiB."""
    bandwidth: str | None = None
    """Rate of the slowest link between the ranks, like 25Gbit."""
    latency: str | None = None
    """With --bandwidth: time of a collective, a doubling of ranks (default: 20us)."""
    utilisation: Share | None = None
    """Share of the GPU's peak that is reached, like 0.3."""
    images_per_second: Positive | None = None
    """Speed that was measured on one rank, instead of a share."""
    measure: bool = False
    """Take the config's steps on this machine for a minute, and count on from there."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def machines(self, config: Config) -> hardware.Machines:
        """Return the assumptions about the machines. Raises ConfigError for unknown names and unused settings."""
        if self.gpu is not None and config.device == "cpu":
            raise ConfigError(f"--gpu: {self.gpu!r} has no effect with device: cpu; leave it out, or set device to auto")
        gpu = None if self.gpu is None else hardware.gpu(self.gpu)
        bandwidth = None if self.bandwidth is None else hardware.bandwidth(self.bandwidth)
        if self.latency is not None and bandwidth is None:
            raise ConfigError(f"--latency: {self.latency!r} has no effect without --bandwidth; give both, or leave it out")
        latency = hardware.seconds("20us" if self.latency is None else self.latency)
        if self.utilisation is not None and (gpu is None or not gpu.peak):
            raise ConfigError("--utilisation: is a share of a GPU's peak; name the GPU by --gpu, like h100")
        if (self.utilisation is not None) + (self.images_per_second is not None) + self.measure > 1:
            raise ConfigError("--utilisation, --images-per-second, --measure: each says how fast a rank is; give one of them")
        if self.measure and bandwidth is not None:
            raise ConfigError("--bandwidth: has no effect with --measure, whose steps have their exchange; leave it out")
        on_cuda = config.device != "cpu"
        return hardware.Machines(gpu, bandwidth, latency, self.utilisation, self.images_per_second, on_cuda)
