"""Load shards by name: a folder, its URL, or tars in braces."""

import dataclasses
import io
import itertools
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from braceexpand import braceexpand

from simclr_dist.data.manifest import MANIFEST_NAME, Manifest, check_shards, content_digest, parse_manifest, read_manifest
from simclr_dist.data.remote.fetch import Patience, check_url, fetch, is_url, join
from simclr_dist.system.errors import ConfigError, DataError, UnreachableError, redact

PIPE = "pipe:"

_MOST_SHARDS = 1_000_000
_LONGEST_PATTERN = 4096
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.[^{}]*)?\}")
_MOST_MANIFEST_BYTES = 4 << 30


def load_collection(where: str | Path, *, beside: str | Path = ".", patience: Patience | None = None) -> Manifest:
    """Load the manifest of what `where` names. A relative path starts from the folder `beside`.

    A folder, or its URL, stands for all tars of its manifest. Tars (`shards/train-{000000..000099}.tar`, or one) stand for
    these alone, as the manifest beside them describes them and in its order. Local tars are looked for, remote ones are not.
    Raises DataError when there is no manifest or it does not list the named tars, UnreachableError when its server fails.
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
    if remote:
        manifest = parse_manifest(_fetch_manifest(folders[0], patience), folders[0])
    else:
        manifest = read_manifest(Path(beside) / (folders[0] or ("/" if text.startswith("/") else ".")))
    if tars:
        names = [tar.rpartition("/")[2] for tar in tars]
        manifest = _only(manifest, [unquote(name) for name in names] if remote and text.startswith("http") else names)
    if not remote:
        check_shards(manifest)
    return manifest


def count_images(where: str | Path, samples: int | None = None, *, beside: str | Path = ".") -> int:
    """Count the images of what `where` names. `samples` is the count if the user states it, else the manifest's is used."""
    return len(load_collection(where, beside=beside)) if samples is None else samples


def names_tars(where: str | Path) -> bool:
    """Tell whether `where` names tars and not a folder. It may name one tar, or many by braces."""
    # Not Path.is_dir: it raises for a text that is longer than a file name may be, as braces are.
    if not is_url(where) and os.path.isdir(where):  # noqa: PTH112
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


def find_tars(where: str, *, allow_pipe: bool) -> list[str]:
    """List the tars that `where` stands for. Raises ConfigError and DataError for what cannot or must not be opened."""
    tars = expand(where)
    pipe = next((tar for tar in tars if tar.startswith(PIPE)), None)  # in braces also one among files
    if pipe is not None and not allow_pipe:
        raise ConfigError(f"data.shards: {pipe!r} runs a shell command; if you trust it, add --data.allow_pipe true")
    if where.startswith(PIPE):
        return tars
    if is_url(where):
        check_url(where)
        return tars
    if len(tars) == 1 and os.path.isdir(where):  # noqa: PTH112
        raise DataError(f"{where}: is a folder; data.reader: stream needs its tars, like {where}/shard-{{000000..000099}}.tar")
    for tar in tars:
        if not os.path.isfile(tar):  # noqa: PTH113
            raise DataError(f"{tar}: no such tar; data.shards: {where!r} stands for {len(tars)}")
    return tars


def _only(manifest: Manifest, names: Sequence[str]) -> Manifest:
    """Keep the named shards of a manifest, in its order."""
    wanted, listed = set(names), set(manifest.shards)
    if strange := next((name for name in names if name not in listed), None):
        cure = "name tars that it lists, or the folder for all"
        raise DataError(f"{manifest.folder}/{MANIFEST_NAME}: does not list {strange!r}; {cure}")
    keep = np.array([name in wanted for name in manifest.shards])
    if keep.all():
        return manifest
    rows = keep[manifest.shard]
    arrays = {name: getattr(manifest, name)[rows] for name in ("key", "offset", "size", "label", "width", "height", "sha256")}
    return dataclasses.replace(
        manifest, shards=tuple(name for name in manifest.shards if name in wanted),
        shard_sizes=manifest.shard_sizes[keep], shard_bytes=manifest.shard_bytes[keep],
        shard=(np.cumsum(keep) - 1)[manifest.shard[rows]].astype(np.int32), **arrays,
        digest=content_digest(arrays["key"].tolist(), manifest.classes, arrays["sha256"], arrays["label"]),
    )  # fmt: skip


def _fetch_manifest(folder: str, patience: Patience | None) -> bytes:
    url = join(folder, MANIFEST_NAME)
    check_url(url)
    content = io.BytesIO()
    try:
        fetch(url, content, most=_MOST_MANIFEST_BYTES, patience=patience)
    except UnreachableError as error:
        cure = "; for tars without a manifest, `simclr-dist shard --index` on a copy writes one, or set data.reader: stream"
        missing = "404" in str(error) or "it is not there" in str(error)
        raise UnreachableError(f"{error}{cure if missing else ''}") from None
    return content.getvalue()
