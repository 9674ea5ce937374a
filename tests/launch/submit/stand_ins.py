"""A SLURM of small scripts, for what must not need a cluster: they answer what a test has told them."""

from collections.abc import Callable
from pathlib import Path

SBATCH = """#!/bin/sh
id=$(/bin/cat {folder}/next)
echo $((id + 1)) > {folder}/next
/bin/cp "$1" {folder}/$id.sh
/usr/bin/env -0 > {folder}/$id.env
echo "RUNNING|None|n[1-2]|0:07" > {folder}/$id.state
echo "Submitted batch job $id"
"""

SQUEUE = """#!/bin/sh
for option in "$@"; do case $option in --jobs=*) id=${{option#--jobs=}};; esac; done
if [ -f {folder}/$id.state ]; then exec /bin/cat {folder}/$id.state; fi
echo "slurm_load_jobs error: Invalid job id specified" >&2
exit 1
"""

SCANCEL = """#!/bin/sh
echo "$@" >> {folder}/cancelled
for id in "$@"; do echo "CANCELLED|None|n[1-2]|0:09" > {folder}/$id.state; done
"""

Answer = tuple[int, str, str]
Command = Callable[..., Answer]


class StandIns:
    """Programs in `bin`, and beside them what they have seen: N.sh and N.env of job N, N.state, cancelled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        (folder / "next").write_text("100\n")

    def write(self, name: str, text: str) -> None:
        """Put a program on PATH; {folder} in it is this folder."""
        path = self.bin / name
        path.write_text(text.format(folder=self.folder))
        path.chmod(0o755)

    def state(self, job: int, line: str) -> None:
        """What squeue says of a job: STATE|REASON|NODES|ELAPSED."""
        (self.folder / f"{job}.state").write_text(f"{line}\n")

    def forget(self, job: int) -> None:
        """squeue does not know it any more."""
        (self.folder / f"{job}.state").unlink()

    def take_jobs(self) -> None:
        """A cluster that starts every job at once; a job runs until it is cancelled."""
        for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scancel", SCANCEL), ("srun", "#!/bin/sh\n")):
            self.write(name, text)


def refused(answer: Answer) -> str:
    """The one line of a command that was refused."""
    code, out, err = answer
    assert code == 2, (out, err)
    assert out == ""
    assert err.startswith("simclr-dist: ")
    assert err.count("\n") == 1, err
    return err
