"""Keep remote shards on the local disk. They are whole, within a limit, and shared by all processes of a machine.

The kernel takes a lock from a process that dies, and a shard is written under another name and renamed. So a kill at any
moment leaves whole shards, no lock, and at most a `.part` file. The next process that needs room removes that file. A shard
is named by its content, so the same images at another address are in the cache already.
"""

import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from simclr_dist.data.manifest import Manifest
from simclr_dist.data.remote.fetch import Patience, fetch, join
from simclr_dist.system.errors import ConfigError, UnreachableError, redact, refusing
from simclr_dist.system.files import lock, unlock

FOLDER_VARIABLE = "SIMCLR_DIST_CACHE"
GIB_VARIABLE = "SIMCLR_DIST_CACHE_GIB"
DEFAULT_GIB = 100.0

_POLL = 0.05
_OURS = re.compile("[0-9a-f]{40}")  # names of shards; the folder may hold files of others, which are not removed
_held: set[int] = set()  # descriptors of locks that a child of this process must not keep alive


def _close_held() -> None:
    for descriptor in tuple(_held):
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_held)


@dataclass(frozen=True)
class CacheSettings:
    """Folder of the cache, its limit in bytes, patience with failing servers."""

    folder: Path
    limit: int
    patience: Patience = field(default_factory=Patience)


def cache_settings(folder: str = "", gib: float | None = None, *, patience: Patience | None = None) -> CacheSettings:
    """Fill in missing values from SIMCLR_DIST_CACHE and SIMCLR_DIST_CACHE_GIB. Else use the user's cache folder and 100 GiB.

    `~` and `$VARIABLE` are expanded. Raises ConfigError for a variable that is not set, and for a limit that is no number.
    """
    named = folder or os.environ.get(FOLDER_VARIABLE, "")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    # On clusters the place is known when the job runs: $SLURM_TMPDIR. Of both expansions pathlib has one.
    place = os.path.expanduser(os.path.expandvars(named or f"{base}/simclr_dist/shards"))  # noqa: PTH111
    if "$" in place:
        raise ConfigError(f"data.cache: {named!r} holds a variable that is not set; set it, or name the folder")
    if gib is None:
        try:
            gib = float(os.environ.get(GIB_VARIABLE, DEFAULT_GIB))
        except ValueError:
            gib = 0.0
        if not 0 < gib < float("inf"):
            raise ConfigError(f"{GIB_VARIABLE}: {os.environ[GIB_VARIABLE]!r} is not a number of GiB above 0")
    return CacheSettings(Path(place).absolute(), int(gib * 2**30), patience or Patience())


class ShardCache:
    """The shards of a remote manifest as local files. Many processes and threads may use it at once."""

    def __init__(self, manifest: Manifest, settings: CacheSettings) -> None:
        self._manifest, self._settings = manifest, settings
        self._names: dict[int, str] = {}
        self._began = time.time()
        largest = int(manifest.shard_bytes.max())
        self.check_room(largest, f"its largest shard has {largest / 2**30:.3g}")
        with refusing(f"data.cache: {settings.folder}: cannot be made", ConfigError, "; name another folder"):
            (settings.folder / "locks").mkdir(parents=True, exist_ok=True)
        with self._lock("room"):
            pass  # fails now if this disk cannot lock files

    def check_room(self, needed: int, why: str) -> None:
        """Refuse a limit of fewer than `needed` bytes; raises ConfigError."""
        if needed > self._settings.limit:
            raise ConfigError(
                f"data.cache_gib: {self._settings.limit / 2**30:.3g} GiB are too few for {redact(str(self._manifest.folder))}:"
                f" {why} GiB; raise it"
            )

    def url(self, shard: int) -> str:
        return join(str(self._manifest.folder), self._manifest.shards[shard])

    def has(self, shard: int) -> bool:
        """Tell whether the whole shard is in the cache."""
        return self._path(shard).exists()

    def open(self, shard: int, needed: Collection[int] = ()) -> int:
        """Open the shard's file. Fetch it first if it is missing. No process evicts it while it is open.

        `needed` are shards that must not make room for it. Raises UnreachableError when it cannot be fetched, or has no room.
        """
        while (descriptor := self.open_if_here(shard)) is None:
            self._obtain(shard, needed)
        return descriptor

    def open_if_here(self, shard: int) -> int | None:
        """Open the shard's file. Returns None where it would have to be fetched."""
        try:
            descriptor = os.open(self._path(shard), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UnreachableError(f"data.cache: {self._path(shard)}: cannot be read: {error.strerror}") from None
        lock(descriptor, shared=True, wait=True)
        with suppress(OSError):  # a file of another user: then it counts as older than it is
            os.utime(descriptor)
        return descriptor

    def fetch_ahead(self, shard: int, needed: Collection[int], stopped: Callable[[], bool]) -> bool:
        """Fetch a shard that will be needed. Skip it when another process fetches it, or the whole cache is needed sooner.

        Returns whether there is, or may soon be, more to fetch. Raises UnreachableError like `open`.
        """
        with self._lock(self._name(shard), wait=False) as locked:
            return not locked or self.has(shard) or self._fetch(shard, needed, wait=False, stopped=stopped)

    def again(self, shard: int) -> None:
        """Remove a shard whose bytes are wrong, once in a run. The next `open` fetches it anew."""
        marker = self._path(shard, "again")
        with self._lock(self._name(shard)):
            if not marker.exists() or marker.stat().st_mtime < self._began:  # the server may have been mended since
                marker.touch()
                self._path(shard).unlink(missing_ok=True)

    def _name(self, shard: int) -> str:
        if shard not in self._names:
            m, end = self._manifest, int(self._manifest.shard_ends[shard])
            rows = slice(end - int(m.shard_sizes[shard]), end)
            about = hashlib.sha256(f"{m.shards[shard]}\n{m.shard_bytes[shard]}\n".encode())
            for part in (m.offset[rows], m.size[rows]):
                about.update(part.astype("<i8").tobytes())
            about.update(m.sha256[rows].tobytes())
            self._names[shard] = about.hexdigest()[:40]
        return self._names[shard]

    def _path(self, shard: int, kind: str = "tar") -> Path:
        return self._settings.folder / f"{self._name(shard)}.{kind}"

    def _obtain(self, shard: int, needed: Collection[int]) -> None:
        began, failed = time.time(), self._path(shard, "failed")
        with self._lock(self._name(shard)):
            if self.has(shard):
                return
            with suppress(FileNotFoundError):
                if failed.stat().st_mtime > began:  # it failed while this process waited, and would fail again in the same way
                    raise UnreachableError(failed.read_text(encoding="utf-8", errors="replace"))
            self._fetch(shard, needed, wait=True)

    def _fetch(self, shard: int, needed: Collection[int], *, wait: bool, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Fetch a shard; its lock is held. Without `wait`, returns False where there was no room."""
        size = int(self._manifest.shard_bytes[shard])
        try:
            # Files of a process that had this lock and was killed.
            for leftover in self._settings.folder.glob(f"{self._name(shard)}.*.part"):
                leftover.unlink(missing_ok=True)
            part = self._reserve(shard, size, {self._name(other) for other in needed}, wait)
            if part is None:
                return False
            try:
                with part.open("r+b") as file:
                    fetch(self.url(shard), file, size=size, patience=self._settings.patience, stopped=stopped)
                with self._lock("room"):  # a process that counts the files must not miss it while its name changes
                    part.rename(self._path(shard))
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            raise UnreachableError(
                f"data.cache: {self._settings.folder}: {error.strerror}; name a folder with room, or lower data.cache_gib"
            ) from None
        except UnreachableError as error:
            if not stopped():
                with suppress(OSError):
                    self._path(shard, "failed").write_text(str(error), encoding="utf-8")
            raise
        return True

    def _reserve(self, shard: int, size: int, needed: set[str], wait: bool) -> Path | None:
        """Reserve room by an empty file as long as the shard. Older shards make way for it."""
        folder, began = self._settings.folder, time.monotonic()
        while True:
            with self._lock("room"):
                taken = self._make_room(self._settings.limit - size, needed)
                if taken + size <= self._settings.limit:
                    part = folder / f"{self._name(shard)}.{secrets.token_hex(4)}.part"
                    with part.open("xb") as file:
                        file.truncate(size)
                    return part
            if not wait:
                return None
            if time.monotonic() - began > self._settings.patience.seconds:
                raise UnreachableError(
                    f"data.cache_gib: {self._settings.limit / 2**30:.3g} GiB in {folder} are all of shards that are being"
                    f" read, and {redact(self.url(shard))} is needed too; raise it"
                )
            time.sleep(_POLL)

    def _make_room(self, most: int, needed: set[str]) -> int:
        """Free room down to `most` bytes: leftovers, then long unused shards. "room" is locked. Returns how many are left."""
        shards, taken = [], 0
        for entry in os.scandir(self._settings.folder):
            with suppress(FileNotFoundError):
                name, _, kind = entry.name.partition(".")
                if not _OURS.fullmatch(name):
                    continue
                if kind == "tar":
                    about = entry.stat()
                    shards.append((about.st_mtime, about.st_size, name))
                    taken += about.st_size
                elif kind.endswith("part"):
                    size = entry.stat().st_size
                    with self._lock(name, wait=False) as abandoned:  # True: its process was killed
                        if abandoned:
                            Path(entry.path).unlink(missing_ok=True)
                        else:
                            taken += size
        for _, size, name in sorted(shards):
            if taken <= most:
                break
            if name not in needed and self._evict(name):
                taken -= size
        return taken

    def _evict(self, name: str) -> bool:
        tar, *markers = (self._settings.folder / f"{name}.{kind}" for kind in ("tar", "again", "failed"))
        with suppress(FileNotFoundError), tar.open("r+b") as file:
            if not lock(file.fileno()):
                return False
            for path in (tar, *markers):
                path.unlink(missing_ok=True)
        return True

    @contextmanager
    def _lock(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold the lock of that name. Without `wait`, yields False where another process has it."""
        path = self._settings.folder / "locks" / name
        with refusing(f"data.cache: {path}: cannot be opened", UnreachableError, "; name another folder"):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            _held.add(descriptor)
        try:
            try:
                locked = lock(descriptor, wait=wait)
            except OSError as error:
                raise UnreachableError(
                    f"data.cache: {path}: this disk cannot lock files ({error.strerror}); name a folder on a local disk"
                ) from None
            yield locked
        finally:
            _held.discard(descriptor)
            with suppress(OSError):
                unlock(descriptor)  # also for a child that was forked just now
            os.close(descriptor)
