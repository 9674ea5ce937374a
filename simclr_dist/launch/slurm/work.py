"""Define other verbs than `train` as jobs. One has many ranks, or tasks of an array come before it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from simclr_dist.launch.slurm.job import Job
from simclr_dist.launch.slurm.profile import Profile
from simclr_dist.launch.slurm.requeue import Kind, jobs_folder


@dataclass(frozen=True)
class Work:
    """A verb as a job, or as a task of an array. Each of the profile's ranks runs it."""

    source: str  # the verb
    overrides: Sequence[str]  # what is typed behind it
    product: Path  # what it writes; absolute
    profile: Profile
    working_directory: Path  # what relative paths are relative to
    share: Sequence[str] = ()  # more words, of this task alone
    evaluation: None = None

    @property
    def run(self) -> Path:
        return jobs_folder(self.product)

    @property
    def folder(self) -> Path:
        return self.run / "slurm"

    def job(self, kind: Kind) -> Job:
        """Return the object that every task runs."""
        command = ["simclr_dist", self.source, *self.overrides, *self.share]
        return Job(kind, str(self.run), command, str(self.working_directory), self.profile.max_restarts)

    def profile_of(self, _: Kind) -> Profile:
        return self.profile
