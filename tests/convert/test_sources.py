"""Each kind of source: the same images in one order whoever reads them; what is unclear, unsafe or damaged is named."""

import io
import json
import os
import random
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pictures import contents, encoded, stored
from simclr_dist.convert.shards import write_shards
from simclr_dist.convert.sources import originals, tables
from simclr_dist.convert.sources.find import find_source
from simclr_dist.data.manifest import load_manifest
from simclr_dist.system.errors import ConfigError, DataError

Members = dict[str, bytes]


def class_folders(count: int = 6) -> Members:
    return {f"{('cat', 'dog')[i % 2]}/{i:03d}.png": encoded(i) for i in range(count)}


def write_folder(path: Path, members: Members) -> Path:
    for name, content in members.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def write_tar(path: Path, members: Members, kind: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_zip(path: Path, members: Members, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def plain(folder: Path) -> dict[str, tuple[int, bytes]]:
    """`stored`, with the archive's name taken off."""
    return {name.split("/", 1)[1]: value for name, value in stored(folder).items()}


def refused(source: Path | str, out: Path, **options: Any) -> str:
    with pytest.raises((DataError, ConfigError)) as caught:
        write_shards(source, out, processes=1, **options)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    return str(caught.value)


# ---- archives


@pytest.mark.parametrize("write", [write_tar, write_zip, lambda p, m: write_zip(p, m, zipfile.ZIP_STORED)])
@pytest.mark.parametrize("prefix", ["", "animals/", "./", "./a/b/"])
def test_an_archive_of_class_folders_is_the_folder(tmp_path: Path, write: Callable[..., Path], prefix: str) -> None:
    members = class_folders()
    archive = write(tmp_path / "animals.tar", {prefix + name: content for name, content in members.items()})
    if zipfile.is_zipfile(archive):
        archive = archive.rename(archive.with_suffix(".zip"))
    summary = write_shards(archive, tmp_path / "out", processes=1)
    assert summary.classes == ("cat", "dog")
    inside = prefix.removeprefix("./")
    assert plain(tmp_path / "out") == {inside + name: (i % 2, content) for i, (name, content) in enumerate(members.items())}


def test_an_archive_without_classes_has_no_labels(tmp_path: Path) -> None:
    for prefix in ("", "photos/"):
        write_zip(tmp_path / "photos.zip", {f"{prefix}{i}.png": encoded(i) for i in range(3)} | {"notes.txt": b"x"})
        out = tmp_path / f"out{len(prefix)}"
        summary = write_shards(tmp_path / "photos.zip", out, processes=1)
        assert (summary.written, summary.classes, len(summary.skipped)) == (3, (), 1)
        assert {label for label, _ in stored(out).values()} == {-1}


def test_webdataset_tars_bring_their_labels(tmp_path: Path) -> None:
    for number in range(2):
        members = {}
        for i in range(3):
            members |= {
                f"{number}{i}.png": encoded(number * 3 + i),
                f"{number}{i}.cls": b"%d" % (i + 4),
                f"{number}{i}.json": b"{}",
            }
        del members[f"{number}0.cls"]
        write_tar(tmp_path / f"x-{number}.tar", members)
    summary = write_shards(tmp_path / "x-*.tar", tmp_path / "out", processes=1)
    labels = {name: label for name, (label, _) in stored(tmp_path / "out").items()}
    assert labels == {f"x-{n}.tar/{n}{i}.png": i + 4 if i else -1 for n in range(2) for i in range(3)}
    assert summary.classes == ()
    write_tar(tmp_path / "bad.tar", {"a.png": encoded(), "a.cls": b"cat"})
    assert "bad.tar: a.cls: 'cat' is no label" in refused(tmp_path / "bad.tar", tmp_path / "none")


def test_only_key_cls_is_the_label(tmp_path: Path) -> None:
    members = {"._0.cls": b"\0\5\x16\7", "0.cls": b"3", "0.coarse.cls": b"vehicle", "0.png": encoded(0), "__MACOSX/0.cls": b"?"}
    write_shards(write_tar(tmp_path / "a.tar", members), tmp_path / "out", processes=1)
    assert load_manifest(tmp_path / "out").label.tolist() == [3]


def test_a_folder_of_archives(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for i in range(2):
        write_tar(tmp_path / "src" / f"{i}.tar", {f"{i}.png": encoded(i)})
    write_shards(tmp_path / "src", tmp_path / "out", processes=1)
    assert set(stored(tmp_path / "out")) == {"0.tar/0.png", "1.tar/1.png"}
    (tmp_path / "out" / "rejected.jsonl").unlink(missing_ok=True)
    assert "a folder of shards already" in refused(tmp_path / "out", tmp_path / "again")


def test_names_and_kinds_that_are_refused_in_a_tar(tmp_path: Path) -> None:
    bad = {"../up.png": "leads out", "/etc/abs.png": "absolute", "a/../../up.png": "leads out"}
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("good.png", "good.png", *bad):
            member = tarfile.TarInfo(name)
            content = encoded()
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, kind in (("soft.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE), ("tty.png", tarfile.CHRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "good.png"
            tar.addfile(member)
    summary = write_shards(path, tmp_path / "out", processes=1)
    reasons = {problem.name.removeprefix("a.tar/"): problem.reason for problem in summary.rejected}
    assert summary.written == 1
    assert reasons.pop("good.png") == "twice in the archive"
    assert (reasons.pop("soft.png"), reasons.pop("hard.png"), reasons.pop("tty.png")) == ("a link", "a hard link", "a device")
    assert all(bad[name] in reason for name, reason in reasons.items())
    assert set(reasons) == set(bad)
    listed = [json.loads(line)["source"] for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert len(listed) == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "out"]


def zip_entry(path: Path, **changes: int) -> None:
    """Rewrite fields of the only entry, in both of its headers."""
    data = bytearray(path.read_bytes())
    central = data.index(b"PK\x01\x02")
    fields = {"flags": (6, 8, "<H"), "method": (8, 10, "<H"), "crc": (14, 16, "<I"), "size": (22, 24, "<I")}
    for name, value in changes.items():
        local_at, central_at, kind = fields[name]
        struct.pack_into(kind, data, local_at, value)
        struct.pack_into(kind, data, central + central_at, value)
    path.write_bytes(data)


def test_zip_entries_that_are_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("link.png")
    info.create_system, info.external_attr = 3, 0o120777 << 16
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("good.png", encoded())
        file.writestr(info, "good.png")
        file.writestr("..\\up.png", encoded())
        file.writestr("C:/windows.png", encoded())
    summary = write_shards(path, tmp_path / "out", processes=1)
    reasons = {problem.name.removeprefix("a.zip/"): problem.reason for problem in summary.rejected}
    assert summary.written == 1
    assert reasons["link.png"] == "a link"
    assert "leads out" in reasons["../up.png"]
    assert "absolute" in reasons["C:/windows.png"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"flags": 1}, "encrypted"),
        ({"method": 12}, "packed by method 12"),
        ({"crc": 1}, "its bytes do not fit its CRC"),
        ({"size": 50}, "unpacks to more bytes than the 50"),
        ({"size": 60000}, "unpacks to fewer bytes than the 60000"),
        ({"size": 2**31}, "larger than 256 MiB: 2147483648 bytes"),
    ],
)
def test_a_zip_that_lies(tmp_path: Path, changes: dict[str, int], says: str) -> None:
    path = write_zip(tmp_path / "a.zip", {"only.png": encoded()})
    zip_entry(path, **changes)
    assert says in refused(path, tmp_path / "out")


def test_a_zip_with_sizes_beyond_any_file(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"a.png": encoded()})
    data = path.read_bytes()
    start, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    entry, last = bytearray(data[start:end]), bytearray(data[end:])
    struct.pack_into("<I", entry, 24, 2**32 - 1)
    struct.pack_into("<H", entry, 30, 12)
    entry += struct.pack("<HHQ", 1, 8, 2**64 - 1)
    struct.pack_into("<I", last, 12, len(entry))
    path.write_bytes(data[:start] + entry + last)
    assert "a place or size that no file has" in refused(path, tmp_path / "out")


def test_a_zip_entry_unfolds_no_further_than_it_says(tmp_path: Path) -> None:
    packed = zlib.compress(bytes(8 << 20), 9)[2:-4]
    path = write_zip(tmp_path / "a.zip", {"only.png": packed}, zipfile.ZIP_STORED)
    zip_entry(path, method=8, size=1000)
    tracemalloc.start()
    try:
        assert "unpacks to more bytes than the 1000" in refused(path, tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_damaged_and_overlapping_zips(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", class_folders())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "not a readable zip" in refused(path, tmp_path / "out")
    end = whole.index(b"PK\x05\x06")
    directory = whole[whole.index(b"PK\x01\x02") : end]
    tail = bytearray(whole[end:])
    struct.pack_into("<HHI", tail, 8, 600, 600, len(directory) * 100)
    path.write_bytes(whole[:end] + directory * 99 + tail)
    assert "entries overlap" in refused(path, tmp_path / "out")


def test_a_damaged_and_a_compressed_tar(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", class_folders())
    path.write_bytes(path.read_bytes()[:-20000])
    assert str(path) in refused(path, tmp_path / "out")
    packed = tmp_path / "a.tar.gz"
    with tarfile.open(packed, "w:gz"):
        pass
    assert "compressed; unpack that first" in refused(packed, tmp_path / "out")
    empty = write_tar(tmp_path / "empty.tar", {"readme.txt": b"x"})
    assert "no image found in it" in refused(empty, tmp_path / "out")


def test_an_archive_with_splits(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    path = write_tar(tmp_path / "src/a.tar", {f"set/{s}/cat/1.png": encoded() for s in ("train", "test")})
    for source in (path, path.parent):  # as one file, and as the only one of a folder, in which there is no such folder
        assert "holds the splits test, train, not classes; unpack it and name one, or" in refused(source, tmp_path / "out")


def test_a_split_alone_is_no_class(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "src", {f"train/{name}": content for name, content in class_folders().items()})
    assert f"name one, like {source / 'train'}, or take" in refused(source, tmp_path / "out")
    assert write_shards(source / "train", tmp_path / "out", processes=1).classes == ("cat", "dog")


@pytest.mark.parametrize("layout", ["{}.tar", "{}/x.tar", "{}/x/1.tar {}/y/1.tar", "{}/x.parquet"])
def test_what_is_named_of_several_splits_can_be_given(tmp_path: Path, layout: str) -> None:
    for name in layout.format("train", "train").split() + layout.format("test", "test").split():
        (path := tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        write_tar(path, {"1.png": encoded()}) if name.endswith("tar") else pq.write_table(table(), path)
    cure = refused(tmp_path / "src", tmp_path / "out").rpartition("name one, like ")[2]
    assert write_shards(cure.strip("'"), tmp_path / "out", processes=1).written


def test_shards_in_splits_are_named_as_what_they_are(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "src", {f"{number}.png": encoded(number) for number in range(4)})
    write_shards(source, tmp_path / "shards", split=(0.5, 0.5), processes=1)
    assert refused(tmp_path / "shards", tmp_path / "out").endswith(f"name one, like {tmp_path / 'shards' / 'test'}")
    cure = refused(tmp_path / "shards" / "test", tmp_path / "out").rpartition("like ")[2]
    assert write_shards(cure.strip("'"), tmp_path / "out", processes=1).written == 2


@pytest.mark.parametrize("what", ["link", "folder", "pipe"])
def test_a_pattern_that_matches_what_is_no_file(tmp_path: Path, what: str) -> None:
    write_tar(tmp_path / "x-1.tar", class_folders())
    make: dict[str, Callable[[Path], Any]] = {
        "link": lambda path: path.symlink_to("gone"),
        "folder": Path.mkdir,
        "pipe": os.mkfifo,
    }
    make[what](tmp_path / "x-2.tar")
    said = refused(tmp_path / "x-*.tar", tmp_path / "out")
    assert f"{tmp_path / 'x-2.tar'}: is no file" in said
    assert ("remove it" in said) == (what != "folder"), "a folder may be the images"


# ---- Arrow


def table(count: int = 10, **features: Any) -> pa.Table:
    images = pa.array([{"bytes": encoded(i), "path": f"{i}.png"} for i in range(count)])
    features = features or {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}
    result = pa.table({"img": images, **{name: pa.array([i % 2 for i in range(count)]) for name in features}})
    return result.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write_arrow(path: Path, rows: pa.Table, *, stream: bool, batch: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(str(path), rows.schema) as writer:
        writer.write_table(rows, max_chunksize=batch)
    return path


@pytest.mark.parametrize("stream", [True, False])
def test_arrow_is_parquet(tmp_path: Path, stream: bool) -> None:
    rows = table(300)
    for i in range(2):
        write_arrow(tmp_path / "arrow" / f"data-{i}.arrow", rows.slice(i * 150, 150), stream=stream, batch=7)
        (tmp_path / "parquet").mkdir(exist_ok=True)
        pq.write_table(rows.slice(i * 150, 150), tmp_path / "parquet" / f"data-{i}.parquet")
    (tmp_path / "arrow" / "state.json").write_text("{}")
    write_arrow(tmp_path / "arrow" / "cache-0123.arrow", rows.rename_columns(["x", "y"]), stream=True)
    summary = write_shards(tmp_path / "arrow", tmp_path / "a", processes=1)
    write_shards(tmp_path / "parquet" / "*.parquet", tmp_path / "p", processes=1)
    assert summary.classes == ("a", "b")
    assert summary.skipped == (("cache-0123.arrow", "made by datasets.map"), ("state.json", "no table"))
    arrow, parquet = stored(tmp_path / "a"), stored(tmp_path / "p")
    assert {name.replace(".arrow", ".parquet"): value for name, value in arrow.items()} == parquet
    assert len(arrow) == 300
    assert len(stored_one := find_source(tmp_path / "arrow" / "data-0.arrow")) == 150
    assert len(stored_one.chunks) == 2


def test_damaged_arrow(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "x.arrow", table(), stream=False)
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[:100], whole[:-10]):
        path.write_bytes(content)
        assert "not a readable Arrow file" in refused(path, tmp_path / "out")
    path = write_arrow(tmp_path / "x.arrow", table(), stream=True)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 600])
    assert "not a readable Arrow file" in refused(path, tmp_path / "out")


def test_what_arrow_itself_does_not_look_at_is_refused(tmp_path: Path) -> None:
    """Its reader takes a file as valid; text that is not UTF-8 is the harmless way to see that we look."""
    rows = pa.table({"image": [{"bytes": encoded(i), "path": f"{i}.png"} for i in range(3)]})
    path = write_arrow(tmp_path / "x.arrow", rows, stream=True)
    path.write_bytes(path.read_bytes().replace(b"0.png1.png", b"0.png\xff.png"))
    assert "cannot be read (In column 0: Invalid: " in refused(path, tmp_path / "out")


def test_splits_in_a_folder_of_arrow_files(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_arrow(tmp_path / "src" / f"cifar10-{split}.arrow", table(), stream=True)
    assert "several splits (test, train)" in refused(tmp_path / "src", tmp_path / "out")
    write_shards(tmp_path / "src" / "*train*.arrow", tmp_path / "out", processes=1)
    pq.write_table(table(), tmp_path / "src" / "x.parquet")
    assert "holds .parquet and .arrow files" in refused(tmp_path / "src", tmp_path / "none")
    assert "this pattern must match" in refused(tmp_path / "src" / "*", tmp_path / "none")


# ---- columns

RENAME = "rename its column of labels, or take none of all with --label-column none"


def test_columns_can_be_named(tmp_path: Path) -> None:
    names = {"fine": {"names": ["x", "y"]}, "coarse": {"names": ["z", "w"]}}
    rows = table(4, **names).append_column("thumb", pa.array([encoded(50 + i) for i in range(4)]))
    path = tmp_path / "t.parquet"
    pq.write_table(rows, path)
    assert "no column 'label', but classes in coarse, fine; choose with --label-column coarse" in refused(
        path, tmp_path / "out"
    )
    summary = write_shards(path, tmp_path / "a", label_column="fine", processes=1)
    assert summary.classes == ("x", "y")
    summary = write_shards(path, tmp_path / "b", label_column="none", image_column="thumb", processes=1)
    assert summary.classes == ()
    assert stored(tmp_path / "b")["t.parquet#2"] == (-1, encoded(52))
    assert "no column 'ist'" in refused(path, tmp_path / "out", label_column="ist")
    assert "no column 'fine' with image bytes (--image-column); of its columns these fit: img, thumb" in refused(
        path, tmp_path / "out", image_column="fine", label_column="none"
    )
    pq.write_table(pa.table({"a": [b"x"], "b": [b"y"]}), path)
    assert "2 columns could hold image bytes (of a, b); name one with --image-column" in refused(path, tmp_path / "out")


def test_tables_whose_labels_are_not_alike(tmp_path: Path) -> None:
    """Else half of the images would have none, and nothing would say so. Of tables of paths, too."""
    write_folder(tmp_path / "src", {f"{i}.png": encoded(i) for i in range(4)})
    for kind, images in (("bytes", [encoded(i) for i in range(4)]), ("paths", [f"{i}.png" for i in range(4)])):
        for part, column in enumerate(("label", "labels")):
            rows = slice(2 * part, 2 * part + 2)
            pq.write_table(pa.table({"image": images[rows], column: [part, part]}), tmp_path / "src" / f"{part}.parquet")
        for path in (tmp_path / "src", tmp_path / "src" / "*.parquet"):
            said = refused(path, tmp_path / kind)
            assert said.endswith("no column 'label', which 0.parquet has; " + RENAME), said
            assert said.startswith(f"{tmp_path / 'src' / '1.parquet'}: ")
        (tmp_path / "src" / "0.parquet").rename(tmp_path / "src" / "2.parquet")
        said = refused(tmp_path / "src", tmp_path / kind)
        assert said == f"{tmp_path / 'src' / '1.parquet'}: no column 'label', which 2.parquet has; {RENAME}"
        write_shards(tmp_path / "src", tmp_path / kind, label_column="none", processes=1)
        assert set(load_manifest(tmp_path / kind).label) == {-1}
        (tmp_path / "src" / "2.parquet").unlink()


def test_columns_and_labels_that_cannot_be_used(tmp_path: Path) -> None:
    images = [encoded(0), encoded(1)]
    for name, columns in (("dot", [("image.bytes", images)]), ("twice", [("image", images), ("image", images)])):
        arrays, names = [pa.array(values) for _, values in columns], [column for column, _ in columns]
        pq.write_table(pa.table(arrays, names=names), tmp_path / f"{name}.parquet")
        assert "there once and has no dot in its name" in refused(tmp_path / f"{name}.parquet", tmp_path / "out")
    labels = pa.array([7, 2**64 - 1], pa.uint64())
    pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / "LARGE.PARQUET")
    (problem,) = write_shards(tmp_path / "LARGE.PARQUET", tmp_path / "out", processes=1).rejected
    assert problem.reason == f"label {2**64 - 1} is not one of the classes"


@pytest.mark.parametrize("write", [write_folder, write_tar, write_zip])
def test_no_labels_are_taken_of_folders_and_archives(tmp_path: Path, write: Callable[..., Path]) -> None:
    source = write(
        tmp_path / {write_tar: "a.tar", write_zip: "a.zip"}.get(write, "src"), {"1.png": encoded(), **class_folders()}
    )
    assert refused(source, tmp_path / "out").endswith("or take no labels, with `simclr-dist shard --label-column none`")
    summary = write_shards(source, tmp_path / "out", label_column="none", processes=1)
    assert (summary.written, summary.classes) == (1 + len(class_folders()), ())
    assert set(load_manifest(tmp_path / "out").label.tolist()) == {-1}


def test_labels_that_are_text_can_be_left_in_a_tar(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"1.png": encoded(), "1.cls": b"cat"})
    assert "'cat' is no label" in (said := refused(path, tmp_path / "out"))
    assert said.endswith("take none with --label-column none")
    assert write_shards(path, tmp_path / "out", label_column="none", processes=1).written == 1


def test_labels_without_sign_may_be_missing_beside_paths(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "src", {f"{number}.png": encoded(number) for number in range(3)})
    pq.write_table(
        pa.table({"path": [f"{n}.png" for n in range(3)], "label": pa.array([1, None, 0], pa.uint8())}), source / "x.parquet"
    )
    write_shards(source / "x.parquet", tmp_path / "out", processes=1)
    assert sorted(load_manifest(tmp_path / "out").label.tolist()) == [-1, 0, 1]


def test_columns_have_no_effect_elsewhere(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "src", class_folders())
    assert "--label-column: 'x' has no effect" in refused(source, tmp_path / "out", label_column="x")
    archive = write_tar(tmp_path / "a.tar", class_folders())
    assert "--image-column: 'x' has no effect" in refused(archive, tmp_path / "out", image_column="x")


# ---- lists


def listing(tmp_path: Path, text: str, count: int = 3) -> Path:
    write_folder(tmp_path / "src", {f"im/{i}.png": encoded(i) for i in range(count)})
    path = tmp_path / "src" / "list.csv"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "labels", "classes"),
    [
        ("path,label\nim/2.png,7\nim/0.png,\nim/1.png,-1\n", [-1, -1, 7], ()),
        ("im/0.png,1\n\nim/1.png,0\r\n./im/2.png,3", [1, 0, 3], ()),
        ("im/0.png\nim/1.png\nim/2.png\n", [-1] * 3, ()),
        ('\ufefffile_name,class\nim/0.png,dog\nim/1.png,"a, cat"\nim/2.png,\n', [1, 0, -1], ("a, cat", "dog")),
    ],
)
def test_lists(tmp_path: Path, text: str, labels: list[int], classes: tuple[str, ...]) -> None:
    summary = write_shards(listing(tmp_path, text), tmp_path / "out", processes=1)
    assert summary.classes == classes
    assert stored(tmp_path / "out") == {f"im/{i}.png": (label, encoded(i)) for i, label in enumerate(labels)}


def test_columns_of_a_list(tmp_path: Path) -> None:
    path = listing(tmp_path, "id,where,kind,size\n1,im/0.png,cat,3\n2,im/1.png,dog,4\n")
    assert "4 columns and no header" in refused(path, tmp_path / "out")
    assert "which column is the label?" in refused(path, tmp_path / "out", image_column="where")
    assert "no column 'sort' (--label-column)" in refused(path, tmp_path / "out", image_column="where", label_column="sort")
    assert "which column is the path?" in refused(path, tmp_path / "out", label_column="kind")
    write_shards(path, tmp_path / "out", image_column="where", label_column="kind", processes=1)
    assert [label for label, _ in stored(tmp_path / "out").values()].count(1) == 1


def test_names_in_a_list_stay_in_its_folder_and_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(encoded(9))
    path = listing(
        tmp_path, f"im/0.png\n../secret.png\n{tmp_path}/secret.png\nlink.png\nim/gone.png\nim//0.png\nin.png\npipe.png\n"
    )
    os.mkfifo(tmp_path / "src" / "pipe.png")
    (tmp_path / "src" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "src" / "in.png").symlink_to(tmp_path / "src" / "im" / "1.png")
    summary = write_shards(path, tmp_path / "out", processes=1)
    assert set(stored(tmp_path / "out")) == {"im/0.png", "in.png", "link.png"}
    assert dict(summary.rejected) == {
        "list.csv:2: ../secret.png": "a path that leads out ('..')",
        f"list.csv:3: {tmp_path}/secret.png": "an absolute path",
        "list.csv:6: im//0.png": "listed twice",
        "im/gone.png": "No such file or directory",
        "pipe.png": "not a regular file",
    }


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_absolute_names_may_go_by_a_link_to_the_lists_folder(tmp_path: Path, kind: str) -> None:
    source = write_folder(tmp_path / "disk" / "src", {f"im/{i}.png": encoded(i) for i in range(2)})
    (tmp_path / "home").symlink_to("disk")
    names = [f"{tmp_path}/home/src/im/{i}.png" for i in range(2)] + [f"{tmp_path}/home/src/../secret.png", "/\0/x.png"]
    if kind == "csv":
        (source / "list.csv").write_text("\n".join(names[:3]))
    else:
        pq.write_table(pa.table({"path": names}), source / "list.parquet")
    summary = write_shards(tmp_path / "home" / "src" / f"list.{kind}", tmp_path / "out", processes=1)
    assert set(stored(tmp_path / "out")) == {"im/0.png", "im/1.png"}
    assert {problem.reason for problem in summary.rejected} == {"an absolute path"}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_list_behind_a_link_lists_what_is_beside_the_link(tmp_path: Path, kind: str) -> None:
    """As one in a folder of links does. The target may have another name, in a store with no images beside it."""
    (tmp_path / "blobs").mkdir()
    for name in (f"list.{kind}", f"apart/list.{kind}"):
        write_folder(tmp_path / "src", {f"{Path(name).parent}/{i}.png": encoded(i) for i in range(3)})
        blob = tmp_path / "blobs" / f"{len(name)}e1f"
        if kind == "csv":
            blob.write_text("path,label\n0.png,4\n2.png,5\n")
        else:
            pq.write_table(pa.table({"image": ["0.png", "2.png"], "label": [4, 5]}), blob)
        (tmp_path / "src" / name).symlink_to(blob)
        out = tmp_path / f"{kind}-{len(name)}"
        summary = write_shards(tmp_path / "src" / name, out, processes=1)
        assert (summary.written, summary.rejected) == (2, ())
        assert stored(out) == {"0.png": (4, encoded(0)), "2.png": (5, encoded(2))}
    (tmp_path / "src" / "bytes.tar").symlink_to(write_tar(tmp_path / "blobs" / "77", class_folders()))
    write_shards(tmp_path / "src" / "bytes.tar", tmp_path / "tar", processes=1)
    assert set(stored(tmp_path / "tar")) == {f"bytes.tar/{name}" for name in class_folders()}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("path,label\n", "lists no image"),
        ("path,label\nim/0.png\n", "line 2 has 1 columns, the first line 2"),
        ("path,label\nim/0.png,-7\n", "line 2: -7 is no label"),
        ("path,label\nim/0.png,99999999999999999999\n", "is no label"),
        (f"path,label\nim/0.png,{'0' * 5000}\n", "line 2: 00000000000000000000 is no label"),
        ("path,label\nim/0.png,0\nim/1.png,\nim/2.png,cat\n", "line 4: label 'cat' is a name, and 0 in line 2 a number; give"),
        ("path,label\nim/0.png,cat\nim/1.png,-1\n", "leave the cell empty for no label"),
        ("path,label\nim/0.png,1.0\nim/1.png,2\n", "line 2: label '1.0' is a name, and 2 in line 3"),
        ('path,label\n"im/0.png,1\n', "not a readable CSV file"),
        ("../a.png\n/b.png\n", "lists no image that can be used; the first: list.csv:1: ../a.png"),
    ],
)
def test_lists_that_are_none(tmp_path: Path, text: str, says: str) -> None:
    assert says in refused(listing(tmp_path, text), tmp_path / "out")


def test_a_list_that_is_no_utf8(tmp_path: Path) -> None:
    path = listing(tmp_path, "")
    path.write_bytes(b"path,label\nim/0.png,k\xe4se\n")
    assert "not a readable CSV file in UTF-8" in refused(path, tmp_path / "out")


# ---- what an image may cost

PEAK = """
import sys
import pyarrow.parquet
from simclr_dist.convert.sources.find import find_source

def peak():  # resource.getrusage would begin with the peak of the process that started this one
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) >> 10

before = peak()
problems = {original.problem for chunk in find_source(sys.argv[1]).chunks for original in chunk.read()}
print(peak() - before, *problems, sep="|")
"""


def peak_of(source: Path) -> tuple[int, list[str]]:
    """Read every image of a source in a process of its own. Returns the MB that took, and the problems."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc to see the memory of a process")
    done = subprocess.run([sys.executable, "-c", PEAK, str(source)], capture_output=True, text=True, check=True)
    megabytes, *problems = done.stdout.strip().split("|")
    return int(megabytes), problems


def test_a_table_of_large_images_is_read_a_row_at_a_time(tmp_path: Path) -> None:
    """40 rows of 4 MB: three times 160 MB when they are read by 64 rows, or by whole row groups."""
    noise = random.Random(0).randbytes((4 << 20) + 40)
    rows = pa.table({"image": [{"bytes": noise[i : i + (4 << 20)]} for i in range(40)], "label": list(range(40))})
    pq.write_table(rows, tmp_path / "x.parquet", row_group_size=1, use_dictionary=False)  # a page each
    megabytes, problems = peak_of(tmp_path / "x.parquet")
    assert megabytes < 60
    assert problems == ["None"]


def test_a_page_that_is_too_large_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pa.table({"image": [bytes(1000 + i) for i in range(300)]})
    for dictionary in (False, True):
        path = tmp_path / f"{dictionary}.parquet"
        pq.write_table(rows, path, use_dictionary=dictionary)
        monkeypatch.setattr(tables, "_MAX_PAGE_BYTES", 400_000)
        assert len(find_source(path)) == 300
        monkeypatch.setattr(tables, "_MAX_PAGE_BYTES", 340_000)
        message = refused(path, tmp_path / "out")
        assert message.startswith(f"{path}: column 'image': a row group of 300 rows has a page of 34")
        assert message.endswith("is the most; write it with fewer rows a group (row_group_size)")
        pq.write_table(rows, path, use_dictionary=dictionary, row_group_size=100)
        assert len(find_source(path)) == 300
    assert tables._page_bytes(b"another format") == 0


def test_an_image_of_too_many_bytes_is_named_and_not_unpacked(tmp_path: Path) -> None:
    """A zip of 250 KB unpacks to 257 MiB."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as packed, packed.open("x.png", "w") as file:
        for _ in range(257):
            file.write(bytes(1 << 20))
    megabytes, problems = peak_of(tmp_path / "a.zip")
    assert megabytes < 20
    large = "larger than 256 MiB: 269484032 bytes"
    assert problems == [large]
    for name in ("x.png", "x.tar"):
        with (tmp_path / name).open("wb") as file:
            if name == "x.tar":
                member = tarfile.TarInfo("x.png")
                member.size = 257 << 20
                file.write(member.tobuf(tarfile.GNU_FORMAT))
            file.truncate((257 << 20) + 10240)
    assert f"x.tar/x.png ({large})" in refused(tmp_path / "x.tar", tmp_path / "out")
    (tmp_path / "x.csv").write_text("x.png\n")
    assert "x.png (larger than 256 MiB: 269494272 bytes)" in refused(tmp_path / "x.csv", tmp_path / "out")


def test_a_cell_of_too_many_bytes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(originals, "MAX_FILE_BYTES", 1 << 20)
    pq.write_table(pa.table({"image": [encoded(), bytes((1 << 20) + 1)]}), tmp_path / "x.parquet")
    (problem,) = write_shards(tmp_path / "x.parquet", tmp_path / "out", processes=1).rejected
    assert problem == ("x.parquet#1", "larger than 1 MiB: 1048577 bytes")


# ---- any number of processes


@pytest.mark.slow  # starts processes that import torch
def test_the_number_of_processes_changes_no_byte_of_any_source(tmp_path: Path) -> None:
    images = {f"{('cat', 'dog')[i % 2]}/{i:03d}.png": encoded(i) for i in range(300)}
    images["cat/bad.png"] = b"no image"
    images["dog/palette.png"] = encoded(1, mode="P")
    sources = [
        write_tar(tmp_path / "a.tar", images),
        write_zip(tmp_path / "a.zip", images),
        write_arrow(tmp_path / "a.arrow", table(300), stream=True),
        write_folder(tmp_path / "files", images) / "list.csv",
    ]
    sources[-1].write_text("".join(f"{name},{name[:3]}\n" for name in images))
    for number, source in enumerate(sources):
        for processes in (1, 2):
            write_shards(source, tmp_path / f"{number}-{processes}", shard_size=40, processes=processes, split=(0.9, 0.1))
        assert contents(tmp_path / f"{number}-1") == contents(tmp_path / f"{number}-2")


def test_an_unreadable_name_in_a_tar(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9\n.png")
    write_shards(write_tar(tmp_path / "a.tar", {name: encoded(), "b.png": b"x"}), tmp_path / "out", processes=1)
    assert set(stored(tmp_path / "out")) == {f"a.tar/{name}"}


def test_a_list_of_gigabytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("wb") as file:
        file.truncate((1 << 30) + 1)
    line = refused(tmp_path / "a.csv", tmp_path / "out")
    assert line.endswith("a.csv: 1073741825 bytes are too many for a list, which has at most 1 GiB; convert it in parts")
