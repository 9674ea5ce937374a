"""Find out which kind a source is: folder, table, archive, list, others."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from simclr_dist.convert.sources.archives import archive_source
from simclr_dist.convert.sources.binary import cifar_source, stl_source
from simclr_dist.convert.sources.folders import FileChunk, folder_source, walk
from simclr_dist.convert.sources.imagenet import validation_source
from simclr_dist.convert.sources.indexed import indexed_source
from simclr_dist.convert.sources.lists import list_source, path_table_source
from simclr_dist.convert.sources.lmdb import lmdb_source
from simclr_dist.convert.sources.npz import SUFFIX as NPZ
from simclr_dist.convert.sources.npz import npz_source
from simclr_dist.convert.sources.originals import NO_LABEL, PACKED_SUFFIXES, Files, Problem, Source, is_image_name, split_names
from simclr_dist.convert.sources.tables import table_source
from simclr_dist.convert.sources.tfrecord import tfrecord_source
from simclr_dist.data.manifest import MANIFEST_NAME
from simclr_dist.system.errors import DataError, printable

_TABLES = (".parquet", ".arrow")


def _tables(files: Files) -> Source:
    place = files.root, files.names, files.image_column, files.label_column
    listed = path_table_source(*place)
    return table_source(*place) if listed is None else listed


def _archives(files: Files) -> Source:
    files.refuse_columns(NO_LABEL)
    return archive_source(files.source, files.paths, labelled=files.label_column is None)


def _list(files: Files) -> Source:
    return list_source(files.paths[0], files.image_column, files.label_column)


def _pickled(files: Files) -> Source:
    raise DataError(f"{files.source}: is CIFAR's Python version, which is pickled and never unpickled; take its binary version")


def _lance(files: Files) -> Source:
    table = (
        f"pyarrow.parquet.write_table(lance.dataset({str(files.source)!r}).to_table(), 'images.parquet', row_group_size=100)"
    )
    raise DataError(f"{files.source}: is a Lance data set; make it Parquet with `pip install pylance`, and in Python: {table}")


class SourceKind(NamedTuple):
    """A kind of source. A file is of the first kind that its name fits. `read` makes a source of files of one kind.

    Files that fit `beside` belong to it. A kind with `alone` is no kind of folder.
    """

    what: str
    name: str
    read: Callable[[Files], Source]
    beside: str = r"(?!)"
    alone: bool = False


KINDS = (
    SourceKind("Parquet", r"(?i)\.parquet$", _tables),
    SourceKind("Arrow", r"(?i)\.arrow$", _tables),
    SourceKind("ImageNet's ILSVRC2012_img_val.tar", r"^ILSVRC2012_img_val.*\.tar$", validation_source, r"\.(txt|mat)$"),
    SourceKind("archive", r"(?i)\.(tar|zip)$", _archives),
    SourceKind("list in CSV", r"(?i)\.csv$", _list, alone=True),
    SourceKind("STL-10's binary files", r"^(train|test|unlabeled)_X\.bin$", stl_source, r"_y\.bin$|\.txt$"),
    SourceKind("CIFAR's binary files", r"^(data_batch_\d|test_batch|train|test)\.bin$", cifar_source, r"\.(txt|html)$"),
    SourceKind("CIFAR's Python version", r"^(data_batch_\d|test_batch|train|test)$", _pickled),
    SourceKind("MedMNIST's .npz", r"\.npz$", npz_source),
    SourceKind("LMDB", r"^(?!lock\.).*\.(mdb|lmdb)$", lmdb_source, r"^lock\.mdb$|-lock$"),
    SourceKind("TFRecord", r"\.tfrecords?\b|-\d{5}-of-\d{5}$", tfrecord_source, r"\.(json|txt)$"),
    SourceKind("MosaicML's MDS, or LitData", r"^index\.json$", indexed_source, r"\.(mds|bin)(\.\w+)?$|\.json$"),
    SourceKind("Lance", r"\.lance$", _lance, r"\.(txn|manifest|json)$"),
)


def source_kind(name: str) -> SourceKind | None:
    """Tell a file's kind by its name."""
    return next((kind for kind in KINDS if re.search(kind.name, name.rpartition("/")[2])), None)


def find_source(source: str | Path, *, image_column: str | None = None, label_column: str | None = None) -> Source:
    """List the images of `source` without reading them.

    `source` is a folder with a folder for each class (labels by sorted name), a flat folder of images (label -1), a file of one
    of `KINDS`, a folder of such files, or a pattern for them like `data/train-*.parquet`. Tables are read as Hugging Face
    writes them: image bytes in `image` or `img`, an integer `label` (null and -1: none), class names in the schema.
    `image_column` and `label_column` ('none': no labels) name others, also of a list. A table without bytes may hold paths.
    The functions in `KINDS` describe the others. Raises DataError when there is nothing to read or it is unclear what to read,
    ConfigError for a column where there are none.
    """
    source = Path(source)
    others = "nor another that `simclr-dist shard --help` lists"
    unknown = DataError(f"{source}: no such folder of images, nor a .parquet, .arrow, .tar, .zip or .csv file, {others}")
    # Not Path's own: they raise for a name that is longer than any file's.
    if not os.path.exists(source) and "*" in source.name:
        paths = sorted(source.parent.glob(source.name))
        if strange := next((path for path in paths if not os.path.isfile(path)), None):
            cure = "name others, or the folder" if strange.is_dir() else "remove it, or name others"
            raise DataError(f"{strange}: is no file that can be read, and {source.name} matches it; {cure}")
        kinds = {source_kind(path.name) for path in paths}
        if len(kinds) != 1 or None in kinds or any(kind and kind.alone for kind in kinds):
            raise DataError(
                f"{source}: this pattern must match files of one kind (Parquet, Arrow, tar ...); it matches {len(paths)} files"
            )
    elif os.path.isfile(source) or (source.parent.suffix == NPZ and os.path.isfile(source.parent)):
        paths = [source]
    elif os.path.isdir(source):
        return _folder(Files(source, source.resolve(), [], image_column, label_column))
    else:
        raise unknown
    # A link counts where it stands: its target may be a blob of a store, with no such name and with no images beside it.
    root, names = source.parent.resolve(), [path.name for path in paths]
    if source.parent.suffix == NPZ and not os.path.isdir(source.parent):
        root, names = root.parent, [f"{root.name}/{source.name}"]
    if (kind := source_kind(names[0].partition("/")[0])) is not None:
        return kind.read(Files(source, root, names, image_column, label_column))
    if source.suffix.lower() in PACKED_SUFFIXES:
        raise DataError(f"{source}: is compressed; unpack that first (images are read by their place), or make it a .zip")
    raise unknown


def _folder(files: Files) -> Source:
    source, root = files.source, files.root
    names, rejected, skipped, links = walk(root)
    # datasets.map leaves such a file beside a table: a second table, made from the first.
    caches = {name for name in names if name.endswith(".arrow") and name.split("/")[-1].startswith("cache-")}
    kinds = {name: kind for name in names if name not in caches and (kind := source_kind(name)) and not kind.alone}
    tables = [name for name in kinds if name.lower().endswith(_TABLES)]
    archives = {name for name in names if name.lower().endswith((".tar", ".zip"))}
    if MANIFEST_NAME in tables and archives:
        raise DataError(f"{source}: is a folder of shards already; to shard them anew, name its tars, like '{source}/*.tar'")
    # img2dataset leaves a table without images beside each tar, or beside each folder of files. Such folders are no classes.
    places = archives | {f"{name.rpartition('/')[0]}.tar" for name in names}
    downloaded = {name for name in tables if Path(name).stem.isdecimal() and f"{name.removesuffix('.parquet')}.tar" in places}
    if downloaded.issuperset(tables):
        tables, kinds = [], {name: kind for name, kind in kinds.items() if name not in tables}
    elif len({kinds[name] for name in tables}) > 1:
        raise DataError(f"{source}: holds .parquet and .arrow files; name those of one kind, like '{source}/*.parquet'")
    kind = next((kind for kind in KINDS if kind in kinds.values()), None)
    if kind is not None and (tables or not any(map(is_image_name, names))):
        used = [name for name in kinds if kinds[name] is kind]
        _refuse_splits(source, tables or [name for name in kinds if kinds[name].read is not _pickled])
        whole = kind.read(files._replace(names=used))
        used += [name for name in names if re.search(kind.beside, name.rpartition("/")[2])]
    else:
        kind, used = None, names
        files.refuse_columns(NO_LABEL)
        whole = folder_source(source, root, names, labelled=not downloaded and files.label_column is None)
    listed = {name for chunk in whole.chunks if isinstance(chunk, FileChunk) for name, _ in chunk.files}
    for name in sorted(set(names) - set(used) - listed):
        reason = "no table" if tables else f"no {kind.what if kind else 'archive'}"
        if tables and (name in caches or is_image_name(name)):
            reason = "made by datasets.map" if name in caches else "an image beside tables"
        skipped.append(Problem(printable(name), reason))
    return replace(whole, rejected=(*rejected, *whole.rejected), skipped=(*skipped, *whole.skipped), links=links)


def _refuse_splits(source: Path, names: Sequence[str]) -> None:
    """Refuse files of several splits. Raises DataError that names those of the first one."""
    if len(splits := split_names(names, folders=False)) > 1:
        of_first = [name for name in names if split_names([name], folders=False) == splits[:1]]
        one, folder = str(source / of_first[0]), of_first[0].split("/")[0]
        if split_names([folder], folders=True):
            one = str(source / folder)
        elif len(of_first) > 1:
            turned = [name[::-1] for name in of_first]
            start, end = os.path.commonprefix(of_first), os.path.commonprefix(turned)[::-1]  # noqa: RUF071 (it goes by letters, as is meant)
            one = f"'{source}/{start}*{end}'"
        raise DataError(f"{source}: holds several splits ({', '.join(splits)}); name one, like {one}")
