"""Load shards by name: a folder, its URL, or tars in braces."""

import dataclasses
import hashlib
import itertools
import os
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

import numpy as np
from braceexpand import braceexpand
from numpy.typing import NDArray

from simclr_dist.data.columns import Sides, content_digest
from simclr_dist.data.index import Parquet, open_index
from simclr_dist.data.manifest import MANIFEST_NAME, Manifest, check_shards, read_manifest
from simclr_dist.data.pixels.kinds import Kind
from simclr_dist.data.remote.cache import CacheSettings, cache_settings
from simclr_dist.data.remote.fetch import check_url, fetch, is_url, join
from simclr_dist.system.errors import ConfigError, DataError, UnreachableError, redact

PIPE = "pipe:"

_MOST_SHARDS = 1_000_000
_LONGEST_PATTERN = 4096
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.[^{}]*)?\}")
_MOST_MANIFEST_BYTES = 4 << 30
_ROWS = 1 << 16  # at a time


def load_collection(
    where: str | Path, *, beside: str | Path = ".", cache: CacheSettings | None = None, kind: tuple[int, int] | None = None
) -> Manifest:
    """Load the manifest of what `where` names. A relative path starts from the folder `beside`.

    A folder, or its URL, stands for all tars of its manifest. Tars (`shards/train-{000000..000099}.tar`, or one) stand for
    these alone, as the manifest beside them describes them and in its order. Local tars are looked for, remote ones are not.
    Raises DataError when there is no manifest or it does not list the named tars, UnreachableError when its server fails,
    ConfigError where images are not of the `kind` that is asked for.
    """
    text, remote = str(where), is_url(where)
    if text.startswith(PIPE):
        raise DataError(f"{text}: a shell command has no manifest; it can only be read with data.reader: stream")
    tars = expand(text) if names_tars(where if remote else Path(beside) / where) else []
    folders = sorted({tar.rpartition("/")[0] for tar in tars}) or [text.rstrip("/") if remote else text]
    if len(folders) > 1:
        raise DataError(
            f"{redact(text)}: its tars lie in {len(folders)} folders, and a manifest describes one; name one folder's tars"
        )
    if cache is None:
        with suppress(ConfigError):  # of the environment; it matters where shards go through the cache, and is said there
            cache = cache_settings()
    if remote:
        manifest = _fetch_manifest(folders[0], cache)
    else:
        folder = Path(beside) / (folders[0] or ("/" if text.startswith("/") else "."))
        manifest = read_manifest(folder, cache=cache.folder if cache else None)
    if tars:
        names = [tar.rpartition("/")[2] for tar in tars]
        manifest = _only(manifest, [unquote(name) for name in names] if remote and text.startswith("http") else names)
    if not remote:
        check_shards(manifest)
    if kind is not None:
        _check_kind(manifest, Kind(*kind))
    return manifest


def _check_kind(manifest: Manifest, kind: Kind) -> None:
    if manifest.kind != kind:
        asks = f"data.channels and data.bit_depth ask for {kind}"
        cure = f"change that, or shard the images again with --channels {kind.channels} --bit-depth {kind.bit_depth}"
        raise ConfigError(f"{manifest.folder}: its images have {manifest.kind}, and {asks}; {cure}")


def names_tars(where: str | Path) -> bool:
    """Tell whether `where` names tars and not a folder. It may name one tar, or many by braces."""
    # Not Path.is_dir: it raises for a text that is longer than a file name may be, as braces are.
    if not is_url(where) and os.path.isdir(where):
        return False
    text = str(where)
    return "{" in text or text.endswith(".tar")


def expand(pattern: str) -> list[str]:
    """Expand brace notation to its tars, in its order. Examples: `a-{000..002}.tar`, `{train,extra}-{0..9}.tar`."""
    if len(pattern) > _LONGEST_PATTERN:
        raise DataError(f"{redact(pattern[:100])}...: is longer than {_LONGEST_PATTERN} characters; name fewer tars by braces")
    # braceexpand would hold the whole range in memory.
    too_many = any(abs(int(last) - int(first)) > _MOST_SHARDS for first, last in _RANGE.findall(pattern))
    try:
        tars = [] if too_many else list(itertools.islice(braceexpand(pattern), _MOST_SHARDS + 1))
    except ValueError as error:
        raise DataError(f"{redact(pattern)}: {error if str(error) else 'its braces cannot be expanded'}") from None
    if too_many or len(tars) > _MOST_SHARDS:
        raise DataError(f"{redact(pattern)}: stands for more than {_MOST_SHARDS} shards")
    if len(set(tars)) < len(tars):
        ((double, _),) = Counter(tars).most_common(1)
        raise DataError(f"{redact(pattern)}: names {redact(double)} twice")
    return tars


def find_tars(where: str, *, allow_pipe: bool, beside: str | Path = ".", ranks: int = 1, workers: int = 0) -> list[str]:
    """List the tars that `where` stands for. A relative path starts from the folder `beside`.

    Raises ConfigError and DataError for what cannot or must not be opened, and where a reader would have no tar.
    """
    tars, readers = expand(where), max(1, workers)
    pipe = next((tar for tar in tars if tar.startswith(PIPE)), None)  # in braces also one among files
    if pipe is not None and not allow_pipe:
        raise ConfigError(f"data.shards: {pipe!r} runs a shell command; if you trust it, add --data.allow_pipe true")
    if is_url(where):
        check_url(where)
    elif len(tars) == 1 and os.path.isdir(Path(beside, where)):
        raise DataError(f"{where}: is a folder; data.reader: stream needs its tars, like {where}/shard-{{000000..000099}}.tar")
    for tar in tars if not (is_url(where) or where.startswith(PIPE)) else ():
        if not os.path.isfile(Path(beside, tar)):
            raise DataError(f"{tar}: no such tar; data.shards: {where!r} stands for {len(tars)}")
    if len(tars) < ranks * readers:
        raise ConfigError(
            f"data.shards: {redact(where)}: {len(tars)} tars are too few for {ranks} ranks with {readers} readers each;"
            " lower data.workers, or cut the images into more tars"
        )
    return tars


def digest_of_tars(tars: Sequence[str], samples: int) -> str:
    """Return a digest of tars that have no manifest. Their folder is left out: they may be moved."""
    names = [tar if tar.startswith(PIPE) else tar.rpartition("/")[2] for tar in tars]
    return f"stream-{hashlib.sha256(chr(10).join([*names, str(samples)]).encode()).hexdigest()}"


def _only(manifest: Manifest, names: Sequence[str]) -> Manifest:
    """Keep the named shards of a manifest, in its order."""
    wanted, listed = set(names), set(manifest.shards)
    if strange := next((name for name in names if name not in listed), None):
        cure = "name tars that it lists, or the folder for all"
        raise DataError(f"{manifest.folder}/{MANIFEST_NAME}: does not list {strange!r}; {cure}")
    keep = np.array([name in wanted for name in manifest.shards])
    if keep.all():
        return manifest
    ends, first, last = manifest.shard_ends, *np.flatnonzero(keep)[[0, -1]]
    rows: slice | NDArray[np.int64] = slice(ends[first] - manifest.shard_sizes[first], ends[last])
    if not keep[first : last + 1].all():  # then copies, no views
        rows = np.flatnonzero(np.repeat(keep, manifest.shard_sizes))
    arrays = {name: getattr(manifest, name)[rows] for name in ("offset", "size", "label", "width", "height", "sha256")}
    part = dataclasses.replace(
        manifest, shards=tuple(name for name in manifest.shards if name in wanted), shard_sizes=manifest.shard_sizes[keep],
        shard_bytes=manifest.shard_bytes[keep], key=manifest.key.only(rows), **arrays,
    )  # fmt: skip
    return dataclasses.replace(part, **_counted(part))


def _counted(m: Manifest) -> dict[str, Any]:
    """Compute the values of a manifest that are of all its images."""
    sides = Sides()
    for part in _parts(m):
        sides.add(m.width[part], m.height[part])
    return {"short_side": sides.median(), "pixels": sides.pixels, "digest": _digest(m)}


def _digest(m: Manifest) -> str:
    keys, hashes = (m.key.only(part).tolist() for part in _parts(m)), (m.sha256[part] for part in _parts(m))
    return content_digest(keys, m.classes, hashes, (m.label[part] for part in _parts(m)))


def _parts(m: Manifest) -> list[slice]:
    return [slice(first, first + _ROWS) for first in range(0, len(m), _ROWS)]


def check_content(manifest: Manifest) -> None:
    """Raise DataError where keys and labels are not those of the digest."""
    if _digest(manifest) != manifest.digest:
        cure = f"`simclr-dist shard --verify {manifest.folder}` finds and removes it, and the next start makes it anew"
        raise DataError(f"{manifest.folder}: labels or keys are not those of {MANIFEST_NAME}, so its index is damaged; {cure}")


def _fetch_manifest(folder: str, cache: CacheSettings | None) -> Manifest:
    url = join(folder, MANIFEST_NAME)
    check_url(url)
    try:
        if cache is not None:
            with suppress(OSError):  # no room there
                cache.folder.mkdir(parents=True, exist_ok=True)
                return _fetched(url, folder, tempfile.TemporaryFile(dir=cache.folder), cache)
        return _fetched(url, folder, os.fdopen(os.memfd_create(MANIFEST_NAME), "w+b"), cache)
    except UnreachableError as error:
        cure = "; for tars without a manifest, `simclr-dist shard --index` on a copy writes one, or set data.reader: stream"
        missing = "404" in str(error) or "it is not there" in str(error)
        raise UnreachableError(f"{error}{cure if missing else ''}") from None


def _fetched(url: str, folder: str, into: BinaryIO, cache: CacheSettings | None) -> Manifest:
    with into:
        fetch(url, into, most=_MOST_MANIFEST_BYTES, patience=cache.patience if cache else None)
        into.flush()
        return Manifest(folder, **open_index(Parquet(into, f"{folder}/{MANIFEST_NAME}"), None, cache.folder if cache else None))
