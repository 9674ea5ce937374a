"""What `data.shards`, `eval --train` and the like may name: a folder, the URL of one, or tars in brace notation."""

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

from simclr_dist.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    check_shards,
    content_digest,
    load_manifest,
    parse_manifest,
    read_manifest_file,
)
from simclr_dist.data.remote.fetch import Patience, check_url, fetch, is_url, join
from simclr_dist.system.errors import ConfigError, DataError, UnreachableError, redact

PIPE = "pipe:"

_MOST_SHARDS = 1_000_000
_LONGEST_PATTERN = 4096
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.[^{}]*)?\}")
_MOST_MANIFEST_BYTES = 4 << 30


def load_collection(where: str | Path, *, beside: str | Path = ".", patience: Patience | None = None) -> Manifest:
    """The manifest of what `where` names; `beside` is the folder that a relative path starts from.

    A folder, or its URL, stands for all tars of its manifest. Tars (`shards/train-{000000..000099}.tar`, or one) stand for
    these alone, as the manifest beside them describes them and in its order. Local tars are looked for, remote ones are not.
    Raises DataError when there is no manifest, when it does not list the tars that are named, and UnreachableError when its
    server fails.
    """
    text = str(where)
    if text.startswith(PIPE):
        raise DataError(f"{text}: a shell command has no manifest; it can only be read with data.reader: stream")
    if not names_tars(Path(beside) / where if not is_url(where) else text):
        if not is_url(where):
            return load_manifest(Path(beside) / where)
        folder: Path | str = text.rstrip("/")
        return parse_manifest(_fetch_manifest(str(folder), patience), folder)
    tars = expand(text)
    folders = sorted({tar.rpartition("/")[0] for tar in tars})
    if len(folders) > 1:
        raise DataError(
            f"{redact(text)}: its tars lie in {len(folders)} folders, and a manifest describes one; name one folder's tars"
        )
    names = [tar.rpartition("/")[2] for tar in tars]
    if is_url(where):
        manifest = parse_manifest(_fetch_manifest(folders[0], patience), folders[0])
        return _only(manifest, [unquote(name) for name in names] if text.startswith("http") else names)
    place = Path(beside) / (folders[0] or ("/" if text.startswith("/") else "."))
    manifest = _only(parse_manifest(read_manifest_file(place), place), names)
    check_shards(manifest)
    return manifest


def names_tars(where: str | Path) -> bool:
    """Whether it names tars, one or by braces, and not a folder."""
    # Not Path.is_dir, which raises for what is longer than a file's name may be, as braces are.
    if not is_url(where) and os.path.isdir(where):  # noqa: PTH112
        return False
    text = str(where)
    return "{" in text or text.endswith(".tar")


def expand(pattern: str) -> list[str]:
    """The tars that brace notation stands for, in its order: `a-{000..002}.tar`, `{train,extra}-{0..9}.tar`."""
    if len(pattern) > _LONGEST_PATTERN:
        raise DataError(f"{redact(pattern[:100])}...: is longer than {_LONGEST_PATTERN} characters; name fewer tars by braces")
    spans = [abs(int(last) - int(first)) for first, last in _RANGE.findall(pattern)]
    if any(span > _MOST_SHARDS for span in spans):  # braceexpand would hold all of it
        raise DataError(f"{redact(pattern)}: stands for more than {_MOST_SHARDS} shards")
    try:
        found = list(itertools.islice(braceexpand(pattern), _MOST_SHARDS + 1))
    except ValueError as error:
        raise DataError(f"{redact(pattern)}: {error if str(error) else 'its braces cannot be expanded'}") from None
    if len(found) > _MOST_SHARDS:
        raise DataError(f"{redact(pattern)}: stands for more than {_MOST_SHARDS} shards")
    if len(set(found)) < len(found):
        ((double, _),) = Counter(found).most_common(1)
        raise DataError(f"{redact(pattern)}: names {redact(double)} twice")
    return found


def find_tars(where: str, *, allow_pipe: bool) -> list[str]:
    """The tars that `where` stands for; raises ConfigError and DataError for what cannot or must not be opened."""
    if where.startswith(PIPE):
        if not allow_pipe:
            raise ConfigError(f"data.shards: {where!r} runs a shell command; set data.allow_pipe: true if you mean it")
        return expand(where)
    tars = expand(where)
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
    """The manifest of the named shards alone, in its own order."""
    known = set(manifest.shards)
    if strange := next((name for name in names if name not in known), None):
        raise DataError(
            f"{manifest.folder}/{MANIFEST_NAME}: does not list {strange!r}; name tars that it lists, or the folder for all"
        )
    wanted = set(names)
    keep = np.array([name in wanted for name in manifest.shards])
    if keep.all():
        return manifest
    rows = keep[manifest.shard]
    arrays = {name: getattr(manifest, name)[rows] for name in ("key", "offset", "size", "label", "width", "height", "sha256")}
    return dataclasses.replace(
        manifest,
        shards=tuple(name for name in manifest.shards if name in wanted),
        shard_sizes=manifest.shard_sizes[keep],
        shard_bytes=manifest.shard_bytes[keep],
        shard=(np.cumsum(keep) - 1)[manifest.shard[rows]].astype(np.int32),
        digest=content_digest(arrays["key"].tolist(), manifest.classes, arrays["sha256"], arrays["label"]),
        **arrays,
    )


def _fetch_manifest(folder: str, patience: Patience | None) -> bytes:
    url = join(folder, MANIFEST_NAME)
    check_url(url)
    content = io.BytesIO()
    try:
        fetch(url, content, most=_MOST_MANIFEST_BYTES, patience=patience)
    except UnreachableError as error:
        raise UnreachableError(
            f"{error}; for tars without a manifest, `simclr-dist shard --index` on a copy writes one, or set"
            " data.reader: stream"
            if "404" in str(error) or "it is not there" in str(error)
            else str(error)
        ) from None
    return content.getvalue()
