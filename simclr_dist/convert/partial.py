"""Keep a conversion in DST.partial until it is done. It holds whole files only, so a killed one can go on.

lock, part-*.lock    held by the runs at work
settings.json        what is converted, and how; a run with other settings is refused
units/               first pass: of each chunk of the source its records, and bytes that the source cannot give again
records.arrow        all records
out/, rows/          second pass: tars, and the manifest's rows of each; out/ becomes DST
temporary/           files that are not whole yet
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from simclr_dist.system.errors import DamagedError, DataError, PassingError, refusing
from simclr_dist.system.files import lock, read_object, sync

_FOLDERS = ("units", "out", "rows", "temporary")


class StaleError(DataError):
    """The content of DST.partial does not fit this conversion. It is left as it is."""


class Partial:
    """The places in DST.partial, for the destination DST. It is picklable."""

    def __init__(self, destination: Path) -> None:
        self.folder = destination.with_name(f"{destination.name}.partial")
        self.units, self.out, self.rows = (self.folder / name for name in ("units", "out", "rows"))
        self.records, self.settings, self.lock = (self.folder / name for name in ("records.arrow", "settings.json", "lock"))

    def unit(self, number: int, kind: str = "arrow") -> Path:
        """Return the path of a unit's records. They are there when it is done. `kind` "bytes" is what it keeps beside them."""
        return self.units / f"{number:06d}.{kind}"

    def whole_files(self, part: int = 0) -> int:
        """Count the units of a part. 0: those of all, and the tars."""
        if part == 0:
            return sum(1 for folder in (self.units, self.rows) for _ in folder.glob("*.arrow"))
        parts = read_object(self.settings, {"parts": int}).get("parts", 1)
        return sum(part_of(int(path.stem), parts) == part for path in self.units.glob("*.arrow"))

    def temporary(self) -> Path:
        """Name a new file that is not whole yet. It has the process id: a killed run's last worker may still be writing."""
        return self.folder / "temporary" / f"{os.getpid()}-{secrets.token_hex(4)}"

    def check_ours(self) -> None:
        """Raise DataError for what is in the way and no conversion wrote."""
        first: Path | None = self.folder
        # The lock comes first, then the settings, then all else; and another part may be making them right now.
        if (ours := self.folder.is_dir() and not self.folder.is_symlink()) and not self._is_begun():
            first = next(self._no_beginning(), None)
        if ours and (first is None or self._is_begun()):
            return
        raise DataError(f"{first}: is in the way and was not made by simclr-dist; move it elsewhere")

    def _is_begun(self) -> bool:
        return self.lock.exists() and self.settings.exists()

    def _no_beginning(self) -> Iterator[Path]:
        usual = ("lock", "part-*.lock", "temporary/[0-9]*-*")
        return (path for path in self.folder.rglob("*") if not path.is_dir() and not any(map(path.match, usual)))

    def remove(self) -> None:
        """Remove what a conversion wrote. What shows that comes last: a kill leaves no half that nobody dares to remove."""
        for name in _FOLDERS:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        with suppress(OSError):
            for path in (self.records, *self.folder.glob("part-*.lock"), self.settings, self.lock):
                path.unlink(missing_ok=True)
            self.folder.rmdir()


def part_of(unit: int, parts: int) -> int:
    """Return the number, from 1, of the part that makes a unit."""
    return unit % parts + 1


def put(temporary: Path, path: Path) -> None:
    """Put a whole file in its place. It is on disk when this returns."""
    sync(temporary)
    temporary.replace(path)


@contextmanager
def hold(destination: Path, about: dict[str, object], part: int | None = None) -> Iterator[Partial]:
    """Hold DST.partial for one run alone, or for one `part`. Parts work beside each other; a stopped run's is taken over.

    `about` is what two runs must agree on. Raises StaleError where they do not, DataError where the folder is not ours, and
    PassingError where another run is at work: in a SLURM job that is one on a lost node, whose lock its disk will take back.
    An OSError of the block becomes one line. After it the same command goes on.
    """
    partial = Partial(destination)
    with refusing(f"{destination}: cannot be written"), ExitStack() as locks:
        if not os.path.lexists(partial.folder):
            partial.folder.mkdir(parents=True, exist_ok=True)
        partial.check_ours()
        if not lock(locks.enter_context(partial.lock.open("a")).fileno(), shared=part is not None):
            raise PassingError(f"{destination}: another run is writing it; wait for that one or stop it")
        if part is not None:
            path = partial.folder / f"part-{part}.lock"
            if not lock(locks.enter_context(path.open("a")).fileno()):
                raise PassingError(f"{destination}: another run works on part {part}; wait for that one or stop it")
        for name in _FOLDERS:
            (partial.folder / name).mkdir(exist_ok=True)
        if not partial.settings.exists():
            temporary = partial.temporary()
            temporary.write_text(json.dumps(about, indent=1), encoding="ascii")
            # Parts that start at once write the same. If not, the last one's stays and the rest stop.
            put(temporary, partial.settings)
        check(partial, about)
        yield partial


def check(partial: Partial, about: dict[str, object]) -> None:
    """Refuse another conversion's `partial`. Raises StaleError, which names the first setting that differs from `about`."""
    before: dict[str, object] = {}
    with suppress(DamagedError):
        before = read_object(partial.settings, {"source": str, "parts": int})
    if not before:
        raise StaleError(f"{partial.settings}: cannot be read; remove {partial.folder} and start anew")
    now = json.loads(json.dumps(about))
    for name in now | before:
        if before.get(name) != now.get(name):
            what = f"{name} {before.get(name)}, not {now.get(name)}"
            if name == "listing":
                what = "other images (or in another order)"
            raise StaleError(
                f"{partial.folder}: holds an unfinished conversion with {what}; give the same again, or remove that folder"
            )
