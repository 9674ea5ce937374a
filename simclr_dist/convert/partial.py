"""DST.partial, where a conversion is until it is done: whole files only, so that a killed one, or its parts, can go on.

lock, part-*.lock    held by who works here
settings.json        what is converted, and how; who comes with something else is refused
units/               first pass: of each chunk of the source its records, and bytes that the source cannot give again
records.arrow        all records
out/, rows/          second pass: tars, and the manifest's rows of each; out/ becomes DST
temporary/           files that are not whole yet
"""

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from simclr_dist.system.errors import DataError


class StaleError(DataError):
    """What lies in DST.partial does not fit this conversion; it is left as it is."""


@dataclass(frozen=True)
class Partial:
    """The folder's places; picklable."""

    folder: Path

    @classmethod
    def of(cls, destination: Path) -> "Partial":
        """The one beside `destination`."""
        return cls(destination.with_name(f"{destination.name}.partial"))

    @property
    def units(self) -> Path:
        """Folder of the first pass."""
        return self.folder / "units"

    @property
    def out(self) -> Path:
        """What becomes the destination."""
        return self.folder / "out"

    @property
    def rows(self) -> Path:
        """The manifest's rows, a file for each tar."""
        return self.folder / "rows"

    @property
    def records(self) -> Path:
        """All records of the first pass."""
        return self.folder / "records.arrow"

    @property
    def settings(self) -> Path:
        """What is converted, and how."""
        return self.folder / "settings.json"

    def temporary(self) -> Path:
        """A new name for a file that is not whole yet; by process, since a killed run's last worker may be writing still."""
        return self.folder / "temporary" / f"{os.getpid()}-{secrets.token_hex(4)}"

    def remove(self) -> None:
        """All of it goes."""
        shutil.rmtree(self.folder, ignore_errors=True)


def put(temporary: Path, path: Path) -> None:
    """A file that is whole takes its place, on disk when this returns."""
    sync(temporary)
    temporary.replace(path)


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def hold(destination: Path, about: dict[str, object], part: int | None = None) -> Iterator[Partial]:
    """DST.partial for one run alone, or for `part` beside other parts; made, or taken over where a run of `about` stopped.

    `about` is what two runs must agree on. Raises StaleError where they do not, DataError where another run is at work or the
    folder is not ours.
    """
    partial = Partial.of(destination)
    partial.folder.mkdir(parents=True, exist_ok=True)
    lock = partial.folder / "lock"
    # In this order, since another part may be making it right now: the lock comes first.
    if any(partial.folder.iterdir()) and not lock.exists():
        raise DataError(f"{partial.folder}: is in the way and was not made by simclr-dist; move it elsewhere")
    with lock.open("a") as held:
        _lock(held.fileno(), fcntl.LOCK_EX if part is None else fcntl.LOCK_SH, f"{destination}: another run is writing it")
        if part is None:
            _take(partial, about)
            yield partial
            return
        with (partial.folder / f"part-{part}.lock").open("a") as own:
            _lock(own.fileno(), fcntl.LOCK_EX, f"{destination}: another run works on part {part}")
            _take(partial, about)
            yield partial


def _lock(descriptor: int, kind: int, busy: str) -> None:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"{busy}; wait for that one or stop it") from None


def _take(partial: Partial, about: dict[str, object]) -> None:
    for folder in (partial.units, partial.out, partial.rows, partial.folder / "temporary"):
        folder.mkdir(exist_ok=True)
    if not partial.settings.exists():
        temporary = partial.temporary()
        temporary.write_text(json.dumps(about, indent=1), encoding="ascii")
        put(temporary, partial.settings)  # parts that start at once write the same, or the last one's stays and the rest stop
    check(partial, about)


def check(partial: Partial, about: dict[str, object]) -> None:
    """Raises StaleError, which names the first setting, when the conversion in `partial` is not the one of `about`."""
    try:
        before: dict[str, object] = json.loads(partial.settings.read_text(encoding="ascii"))
    except (OSError, ValueError):
        raise StaleError(f"{partial.settings}: cannot be read; remove {partial.folder} and start anew") from None
    now = json.loads(json.dumps(about))
    for name in now | before:
        if before.get(name) != now.get(name):
            what = (
                "other images (or in another order)" if name == "listing" else f"{name} {before.get(name)}, not {now.get(name)}"
            )
            raise StaleError(
                f"{partial.folder}: holds an unfinished conversion with {what}; give the same again, or remove that folder"
            )
