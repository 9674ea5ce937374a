"""Find out the kind of a source: folder, table, archive or list."""

import os
from dataclasses import replace
from pathlib import Path

from simclr_dist.convert.sources.archives import archive_source
from simclr_dist.convert.sources.folders import FileChunk, folder_source, walk
from simclr_dist.convert.sources.lists import list_source, path_table_source
from simclr_dist.convert.sources.originals import PACKED_SUFFIXES, Problem, Source, is_image_name, split_names
from simclr_dist.convert.sources.tables import table_source
from simclr_dist.data.manifest import MANIFEST_NAME
from simclr_dist.system.errors import ConfigError, DataError, printable

_TABLES = (".parquet", ".arrow")
_ARCHIVES = (".tar", ".zip")


def find_source(source: str | Path, *, image_column: str | None = None, label_column: str | None = None) -> Source:
    """List the images of `source` without reading them.

    `source` is a folder with a folder for each class (labels by sorted name), a flat folder of images (label -1), a file
    .parquet, .arrow (file or stream), .tar, .zip or .csv, a folder of Parquet or Arrow files or of archives, or a pattern for
    such files like `data/train-*.parquet`. Tables are read as Hugging Face writes them: image bytes in `image` or `img`, an
    integer `label` (null and -1: none), class names in the schema. `image_column` and `label_column` ('none': no labels) name
    others, also of a list. A table without bytes may hold paths. `archive_source`, `list_source` and `path_table_source`
    describe those. Raises DataError when there is nothing to read or it is unclear what to read, ConfigError for a column where
    there are none.
    """
    source = Path(source)
    unknown = DataError(f"{source}: no such folder of images, nor a .parquet, .arrow, .tar, .zip or .csv file")
    # Not Path's own: they raise for a name that is longer than any file's.
    if not os.path.exists(source) and "*" in source.name:  # noqa: PTH110 (as said above)
        paths = sorted(source.parent.glob(source.name))
        kinds = {path.suffix.lower() for path in paths}
        if not kinds or not (kinds <= {_TABLES[0]} or kinds <= {_TABLES[1]} or kinds <= set(_ARCHIVES)):
            kind = ".parquet, .arrow or .tar"
            raise DataError(f"{source}: this pattern must match {kind} files and nothing else; it matches {len(paths)} files")
    elif os.path.isfile(source):  # noqa: PTH113 (the same)
        paths = [source]
    elif os.path.isdir(source):  # noqa: PTH112 (the same)
        return _folder(source, image_column, label_column)
    else:
        raise unknown
    # A link counts where it stands: its target may be a blob of a store, with no such name and with no images beside it.
    root, names = source.parent.resolve(), [path.name for path in paths]
    kind = Path(names[0]).suffix.lower()
    if kind in _TABLES:
        return _tables(root, names, image_column, label_column)
    if kind == ".csv":
        return list_source(root / names[0], image_column, label_column)
    _refuse_columns(source, image_column, label_column)
    if kind in _ARCHIVES:
        return archive_source(source, [root / name for name in names])
    if kind in PACKED_SUFFIXES:
        raise DataError(f"{source}: is compressed; unpack that first (images are read by their place), or make it a .zip")
    raise unknown


def _tables(root: Path, names: list[str], image_column: str | None, label_column: str | None) -> Source:
    listed = path_table_source(root, names, image_column, label_column)
    return table_source(root, names, image_column, label_column) if listed is None else listed


def _folder(source: Path, image_column: str | None, label_column: str | None) -> Source:
    root = source.resolve()
    names, rejected, skipped, links = walk(root)
    # datasets.map leaves such a file beside a table: a second table, made from the first.
    caches = {name for name in names if name.endswith(".arrow") and name.split("/")[-1].startswith("cache-")}
    tables = [name for name in names if name.lower().endswith(_TABLES) and name not in caches]
    archives = [name for name in names if name.lower().endswith(_ARCHIVES)]
    if MANIFEST_NAME in tables and archives:
        raise DataError(f"{source}: is a folder of shards already; to shard them anew, name its tars, like '{source}/*.tar'")
    # img2dataset leaves a table without images beside each tar, or beside each folder of files. Such folders are no classes.
    places = set(archives) | {f"{name.rpartition('/')[0]}.tar" for name in names}
    downloaded = {name for name in tables if Path(name).stem.isdecimal() and f"{name.removesuffix('.parquet')}.tar" in places}
    tables = [] if downloaded.issuperset(tables) else tables
    if tables:
        kinds = {Path(name).suffix.lower() for name in tables}
        if len(kinds) > 1:
            raise DataError(f"{source}: holds .parquet and .arrow files; name those of one kind, like '{source}/*.parquet'")
        splits = split_names(tables, folders=False)
        if len(splits) > 1:
            cure = f"name one, like '{source}/*{splits[0]}*{kinds.pop()}'"
            raise DataError(f"{source}: holds several splits ({', '.join(splits)}); {cure}")
        whole, used = _tables(root, tables, image_column, label_column), tables
    else:
        _refuse_columns(source, image_column, label_column)
        if archives and not any(map(is_image_name, names)):
            whole, used = archive_source(source, [root / name for name in archives]), archives
        else:
            whole, used = folder_source(source, root, names, labelled=not downloaded), names
    listed = {name for chunk in whole.chunks if isinstance(chunk, FileChunk) for name, _ in chunk.files}
    for name in sorted(set(names) - set(used) - listed):
        reason = "made by datasets.map" if name in caches else "an image beside tables" if is_image_name(name) else "no table"
        skipped.append(Problem(printable(name), reason if tables else "no archive"))
    return replace(whole, rejected=(*rejected, *whole.rejected), skipped=(*skipped, *whole.skipped), links=links)


def _refuse_columns(source: Path, image_column: str | None, label_column: str | None) -> None:
    for option, value in (("--image-column", image_column), ("--label-column", label_column)):
        if value is not None:
            raise ConfigError(f"{option}: {value!r} has no effect on {source}, which has no columns")
