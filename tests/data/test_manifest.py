"""What load_manifest gives back, and which damage it refuses."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from simclr_dist.cli.main import main
from simclr_dist.data.manifest import MANIFEST_NAME, Manifest, ManifestRow, load_manifest, write_manifest
from simclr_dist.system.errors import DataError

SHARDS = ["shard-000000.tar", "shard-000001.tar"]
ROWS = [
    ManifestRow("a", SHARDS[0], 0, 10, 1, 4, 3, bytes(32)),
    ManifestRow("b", SHARDS[0], 10, 20, -1, 5, 3, bytes(range(32))),
    ManifestRow("c", SHARDS[1], 5, 50, 0, 6, 3, bytes([7]) * 32),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path / "shards")


def make(folder: Path, rows: list[ManifestRow] = ROWS, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    folder.mkdir(parents=True)
    for name, size in zip(SHARDS, (40, 60), strict=True):
        (folder / name).write_bytes(bytes(size))
    write_manifest(folder, SHARDS, rows, classes)
    return folder


def rewrite(folder: Path, **about: Any) -> None:
    """Change entries of the manifest's metadata."""
    table = pq.read_table(folder / MANIFEST_NAME)
    old = json.loads(table.schema.metadata[b"simclr_dist"])
    pq.write_table(table.replace_schema_metadata({b"simclr_dist": json.dumps(old | about).encode()}), folder / MANIFEST_NAME)


def test_round_trip(folder: Path) -> None:
    manifest = load_manifest(str(folder))
    assert isinstance(manifest, Manifest)
    assert len(manifest) == 3
    assert manifest.folder == folder
    assert manifest.shards == tuple(SHARDS)
    assert manifest.shard_sizes.tolist() == [2, 1]
    assert manifest.shard_sizes.dtype == manifest.offset.dtype == manifest.size.dtype == manifest.label.dtype == np.int64
    assert manifest.shard.dtype == manifest.width.dtype == manifest.height.dtype == np.int32
    assert manifest.sha256.dtype == np.uint8
    assert manifest.key.tolist() == ["a", "b", "c"]
    assert manifest.shard.tolist() == [0, 0, 1]
    assert manifest.offset.tolist() == [0, 10, 5]
    assert manifest.size.tolist() == [10, 20, 50]
    assert manifest.label.tolist() == [1, -1, 0]
    assert manifest.width.tolist() == [4, 5, 6]
    assert manifest.height.tolist() == [3, 3, 3]
    assert [row.tobytes() for row in manifest.sha256] == [row.sha256 for row in ROWS]
    assert manifest.classes == ("cat", "dog")
    assert pq.read_table(folder / MANIFEST_NAME).column("class_name").to_pylist() == ["dog", None, "cat"]


def test_the_same_input_gives_the_same_file(folder: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "other")
    assert (folder / MANIFEST_NAME).read_bytes() == (other / MANIFEST_NAME).read_bytes()


def test_digest_is_of_the_content_and_not_of_the_place(folder: Path, tmp_path: Path) -> None:
    digest = load_manifest(folder).digest
    assert len(digest) == hashlib.sha256().digest_size * 2
    shutil.move(folder, tmp_path / "moved")
    assert load_manifest(tmp_path / "moved").digest == digest
    changes: list[dict[str, Any]] = [{"key": "z"}, {"label": 0}, {"sha256": bytes([1]) * 32}]
    others = [
        load_manifest(make(tmp_path / str(i), [ROWS[0]._replace(**change), *ROWS[1:]])).digest
        for i, change in enumerate(changes)
    ]
    others.append(load_manifest(make(tmp_path / "classes", classes=("cat", "cow"))).digest)
    assert len({digest, *others}) == 5


def test_labels_may_exist_without_class_names(tmp_path: Path) -> None:
    manifest = load_manifest(make(tmp_path / "s", classes=()))
    assert manifest.classes == ()
    assert manifest.label.tolist() == [1, -1, 0]


def refused(folder: Path) -> str:
    """The one line of the DataError."""
    with pytest.raises(DataError) as caught:
        load_manifest(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def test_missing_folder(tmp_path: Path) -> None:
    assert "simclr-dist shard" in refused(tmp_path / "nothing")


@pytest.mark.parametrize("kind", ["folder", "file", "empty", "nothing"])
def test_what_is_no_folder_of_shards_is_met_with_a_command_that_works(tmp_path: Path, kind: str) -> None:
    """Images are named in the place of shards: they become the command's SRC, for its DST has to be empty."""
    named, pictures = tmp_path / "named", tmp_path / "pictures"
    for folder in [pictures, named] if kind == "folder" else [pictures]:
        folder.mkdir()
        Image.new("RGB", (8, 8)).save(folder / "a.png")
    if kind == "file":
        named = tmp_path / "named.csv"
        named.write_text("pictures/a.png\n")
    elif kind == "empty":
        named.mkdir()
    command = re.search("`simclr-dist (shard .*)`", refused(named))
    assert command is not None
    words = command[1].replace(" DST", f" {tmp_path / 'new'}").replace(" SRC", f" {pictures}")
    assert main([*words.split(), "--processes", "1"]) == 0
    assert len(load_manifest(words.split()[-1])) == 1


def test_missing_manifest_names_those_of_a_split(tmp_path: Path) -> None:
    make(tmp_path / "train")
    make(tmp_path / "test")
    message = refused(tmp_path)
    assert str(tmp_path / "train") in message
    assert str(tmp_path / "test") in message


@pytest.mark.parametrize("content", [b"", b"hello", b"PAR1" + bytes(50) + b"PAR1"])
def test_a_manifest_that_is_no_parquet(folder: Path, content: bytes) -> None:
    (folder / MANIFEST_NAME).write_bytes(content)
    assert "not a readable Parquet file" in refused(folder)


def test_a_truncated_manifest(folder: Path) -> None:
    path = folder / MANIFEST_NAME
    path.write_bytes(path.read_bytes()[:-20])
    assert "not a readable Parquet file" in refused(folder)


def test_a_parquet_file_of_others(folder: Path) -> None:
    pq.write_table(pa.table({"key": ["a"]}), folder / MANIFEST_NAME)
    cure = f"move it away, and `simclr-dist shard --index {folder}` writes one"
    assert refused(folder) == f"{folder / MANIFEST_NAME}: not a manifest of simclr-dist; {cure}"


@pytest.mark.parametrize(
    "about",
    [
        {"shards": [{"name": "../other.tar", "bytes": 40, "samples": 2}]},
        {"shards": [{"name": name, "bytes": 40, "samples": 0} for name in SHARDS]},
        {"shards": 3},
        {"classes": None},
    ],
)
def test_foreign_metadata(folder: Path, about: dict[str, Any]) -> None:
    rewrite(folder, **about)
    assert "not a manifest of simclr-dist" in refused(folder)


def test_a_column_of_another_type(folder: Path) -> None:
    table = pq.read_table(folder / MANIFEST_NAME)
    column = table.schema.get_field_index("label")
    changed = table.set_column(column, "label", table.column("label").cast(pa.string()))
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), folder / MANIFEST_NAME)
    assert "not a manifest of simclr-dist" in refused(folder)


def test_another_version(folder: Path) -> None:
    rewrite(folder, version=99)
    assert "99" in refused(folder)


def test_a_missing_shard(folder: Path) -> None:
    (folder / SHARDS[1]).unlink()
    assert SHARDS[1] in refused(folder)


def test_a_shard_of_another_size(folder: Path) -> None:
    with (folder / SHARDS[0]).open("ab") as file:
        file.write(b"x")
    message = refused(folder)
    assert SHARDS[0] in message
    assert "41" in message
    assert "40" in message


@pytest.mark.parametrize(
    "change",
    [{"offset": 31}, {"offset": -1}, {"offset": 2**63 - 5}, {"size": 0}, {"size": 41}, {"label": -2}, {"width": 0}],
)
def test_impossible_rows(tmp_path: Path, change: dict[str, Any]) -> None:
    assert "row 0" in refused(make(tmp_path / "s", [ROWS[0]._replace(**change), *ROWS[1:]]))


def test_a_label_without_a_class(folder: Path) -> None:
    rewrite(folder, classes=["cat"])
    assert "row 0" in refused(folder)


@pytest.mark.parametrize("rows", [[ROWS[2], ROWS[0], ROWS[1]], [ROWS[0], ROWS[2], ROWS[1]]])
def test_rows_out_of_shard_order(tmp_path: Path, rows: list[ManifestRow]) -> None:
    assert "do not follow" in refused(make(tmp_path / "s", rows))


def test_reading_starts_no_thread(folder: Path) -> None:
    """One that still runs when the interpreter ends may abort it."""
    code = (
        "import os, sys\nfrom simclr_dist.data.manifest import load_manifest\n"
        "before = len(os.listdir('/proc/self/task'))\nload_manifest(sys.argv[1])\n"
        "assert len(os.listdir('/proc/self/task')) == before"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
