"""Find images to embed, and check the file for their features. What cannot be used is refused without torch."""

import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from simclr_dist.system.errors import DataError, printable, refusing
from simclr_dist.system.files import remove_leftovers

if TYPE_CHECKING:
    from simclr_dist.convert.sources.originals import Source


def check_out(out: str | Path, sources: Sequence[str | Path], drawn: str | None = None) -> None:
    """Make the folder of `out` and try to write there. Raises DataError where features or map must not go."""
    from simclr_dist.data.manifest import MANIFEST_NAME  # pyarrow: every verb's --help waits for what stands at the top
    from simclr_dist.evaluate.features.file import is_feature_file

    out = Path(out)
    if out.is_dir():
        raise DataError(f"{out}: is a folder; name the file of features, like {out / 'features.parquet'}")
    # Also a guard: when OUT is forgotten, the last image stands in its place.
    if out.suffix not in (".parquet", ".npz"):
        raise DataError(f"{out}: the file of features comes last, and must end in .parquet or .npz")
    if out.exists() and not is_feature_file(out):
        raise DataError(f"{out}: is there, and is no file of features; it is not overwritten: name another one")
    for source in map(Path, sources):
        # A folder that holds Parquet files is read as one of images inside Parquet files.
        if source.is_dir() and not (source / MANIFEST_NAME).is_file() and out.resolve().is_relative_to(source.resolve()):
            raise DataError(f"{out}: is inside {source}, whose images it would be taken for; name a file outside of it")
        if drawn is not None and Path(drawn).resolve().is_relative_to(source.resolve()):
            raise DataError(f"{drawn}: is one of the images, or would be taken for one; name a file elsewhere with --map")
    _try_to_write(out, out.parent)


def check_page_folder(out: str | Path, verb: str) -> tuple[Path, Path]:
    """Make the folder `out` and try to write there. Returns the paths of its page and its table, which are named as the verb.

    Raises DataError where it cannot be, or holds other things than ours.
    """
    out = Path(out)
    names = f"{verb}.html", f"{verb}.parquet"
    remove_leftovers(out, f"{verb}.*")
    if out.is_dir() and (others := sorted({path.name for path in out.iterdir()} - {*names})):
        raise DataError(f"{out}: is there, and holds other things, like {printable(others[0])}; name another folder with --out")
    _try_to_write(out, out)
    return out / names[0], out / names[1]


def _try_to_write(out: Path, folder: Path) -> None:
    with refusing(f"{out}: its folder cannot be written to"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def find_images(sources: Sequence[str | Path]) -> "str | Path | Source":
    """Find images to embed, not read yet. Shards (a folder's path; as text a URL, or tars by braces), or image files.

    Image files are one folder (`convert.sources.find_source`: labels by class folder), or one or more files in the order of
    their paths, without labels. Raises DataError where there is nothing, or not one of these.
    """
    from simclr_dist.convert.sources.find import find_source
    from simclr_dist.convert.sources.folders import FileChunk
    from simclr_dist.convert.sources.originals import Source
    from simclr_dist.data.manifest import MANIFEST_NAME
    from simclr_dist.data.remote.fetch import is_url

    if len(sources) == 1 and (is_url(sources[0]) or "{" in str(sources[0])) and not Path(sources[0]).exists():
        return str(sources[0])  # shards elsewhere, or tars by braces: `data.collection`
    paths = [Path(source) for source in sources]
    if len(paths) == 1 and (folder := paths[0]).is_dir():
        if any(folder.glob(MANIFEST_NAME)) or any(folder.glob(f"*/{MANIFEST_NAME}")):
            return folder  # of shards; or of folders of shards, of which the reader will ask for one
        source = find_source(folder)
        files = [chunk for chunk in source.chunks if isinstance(chunk, FileChunk)]
        if len(files) < len(source.chunks):
            cure = "make shards of it with `simclr-dist shard` first"
            raise DataError(f"{folder}: holds images inside tables or archives; {cure}")
        _check_keys(name for chunk in files for name, _ in chunk.files)
        return source
    for path in paths:
        if path.is_dir():
            raise DataError(f"{path}: is a folder, and {len(paths) - 1} more are named; embed one folder, or image files only")
        if not path.is_file():
            raise DataError(f"{printable(str(path))}: no such file or folder of images")
        if path.suffix in (".parquet", ".tar"):
            raise DataError(f"{path}: is no image; name the folder of shards, or make one with `simclr-dist shard`")
    names = sorted(map(os.fspath, paths))
    _check_keys(names)
    return Source((), [FileChunk.of("", 0, [(name, -1) for name in names])])


def _check_keys(names: Iterable[str]) -> None:
    """Refuse names that become one key. Raises DataError."""
    double, times = Counter(map(printable, names)).most_common(1)[0]
    if times > 1:
        raise DataError(f"{double}: is named twice; name each image once, and rename one of two whose names print alike")
