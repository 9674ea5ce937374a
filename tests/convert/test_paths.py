"""Tables of paths, and folders that img2dataset wrote."""

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pictures import encoded, stored
from simclr_dist.convert.shards import write_shards
from simclr_dist.system.errors import DataError


def pictures(folder: Path, count: int) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number}.png").write_bytes(encoded(number))
    return [f"{number}.png" for number in range(count)]


def write(path: Path, table: pa.Table) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=2)
    else:
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return path


def image(paths: list[str | None], content: bytes | None = None) -> pa.Array:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array([None if path is None else {"bytes": content, "path": path} for path in paths], kind)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("column", ["path", "image", "image struct", "img struct"])
def test_a_table_of_paths_gives_the_files(tmp_path: Path, suffix: str, column: str) -> None:
    names = pictures(tmp_path / "src" / "all", 5)
    paths = [f"all/{name}" for name in names]
    paths[4] = str(tmp_path / "src" / paths[4])  # as `datasets` writes an image folder
    cells = image(paths) if "struct" in column else pa.array(paths)
    table = pa.table({column.split()[0]: cells, "label": [0, 1, None, 1, 0]})
    summary = write_shards(write(tmp_path / "src" / f"t{suffix}", table), tmp_path / "out", processes=1)
    assert (summary.written, summary.rejected) == (5, ())
    expected = {f"all/{name}": (label, encoded(n)) for n, (name, label) in enumerate(zip(names, [0, 1, -1, 1, 0], strict=True))}
    assert stored(tmp_path / "out") == expected


def test_a_folder_of_tables_of_paths_says_what_is_left_out(tmp_path: Path) -> None:
    source = tmp_path / "src"
    names = pictures(source / "all", 3)
    (tmp_path / "secret.png").write_bytes(encoded(9))
    paths = [
        "all/0.png",
        "all/./0.png",
        "../secret.png",
        f"{tmp_path}/secret.png",
        f"{source}/../secret.png",
        None,
        "all/x.png",
    ]
    write(source / "a.parquet", pa.table({"file_name": paths}))
    write(source / "b.parquet", pa.table({"file_name": [f"all/{names[1]}"]}))
    summary = write_shards(source, tmp_path / "out", processes=1)
    assert stored(tmp_path / "out").keys() == {"all/0.png", "all/1.png"}
    up = "a path that leads out ('..')"
    assert {name.removeprefix("a.parquet"): reason for name, reason in summary.rejected} == {
        "#1: all/./0.png": "listed twice", "#2: ../secret.png": up, f"#3: {tmp_path}/secret.png": "an absolute path",
        f"#4: {source}/../secret.png": up, "#5: ": "no path", "all/x.png": "No such file or directory",
    }  # fmt: skip
    assert summary.skipped == (("all/2.png", "an image beside tables"),)
    with pytest.raises(
        DataError, match=re.escape("no image that can be used; the first: c.parquet#0: /etc/x.png (an absolute")
    ):
        write_shards(write(tmp_path / "c.parquet", pa.table({"path": ["/etc/x.png"]})), tmp_path / "none")


def test_bytes_come_before_paths(tmp_path: Path) -> None:
    (name,) = pictures(tmp_path, 1)
    cells: dict[str, Any] = {"photo": [encoded(7)], "path": [name]}
    write_shards(write(tmp_path / "a.parquet", pa.table(cells)), tmp_path / "bytes", processes=1)
    assert stored(tmp_path / "bytes").keys() == {"a.parquet#0"}
    write_shards(tmp_path / "a.parquet", tmp_path / "paths", processes=1, image_column="path")
    assert stored(tmp_path / "paths").keys() == {name}
    mixed = pa.table({"image": pa.concat_arrays([image([name]), image([name], encoded(8))])})
    summary = write_shards(write(tmp_path / "b.parquet", mixed), tmp_path / "mixed", processes=1)
    assert [tuple(problem) for problem in summary.rejected] == [("b.parquet#0", "no image bytes")]


def test_a_change_of_a_listed_file_is_seen(tmp_path: Path) -> None:
    pictures(tmp_path, 2)
    table = write(tmp_path / "t.parquet", pa.table({"path": ["0.png", "1.png"]}))
    write_shards(table, tmp_path / "out", processes=1)
    assert write_shards(table, tmp_path / "out", processes=1).already
    (tmp_path / "0.png").write_bytes(encoded(3) + b"more")
    with pytest.raises(DataError, match="exists and is not empty"):
        write_shards(table, tmp_path / "out", processes=1)


def downloaded(folder: Path, kind: str) -> None:
    """What img2dataset 1.x leaves: two parts of two images, one of which failed."""
    for part in ("00000", "00001"):
        keys = [f"{part}{number:04d}" for number in range(2)]
        about = {"url": ["u"] * 2, "key": keys, "status": ["success", "failed_to_download"], "sha256": ["0"] * 2}
        good = {f"{keys[0]}.jpg": encoded(int(keys[0]), "JPEG"), f"{keys[0]}.json": b"{}", f"{keys[0]}.txt": b"a cat"}
        (folder / part).mkdir(parents=True)
        if kind == "parquet":
            about |= {"jpg": [good[f"{keys[0]}.jpg"], None]}  # type: ignore[dict-item]
        pq.write_table(pa.table(about), folder / f"{part}.parquet")
        (folder / f"{part}_stats.json").write_text(json.dumps({"count": 2}))
        for name, content in good.items() if kind == "files" else ():
            (folder / part / name).write_bytes(content)
        if kind == "webdataset":
            with tarfile.open(folder / f"{part}.tar", "w") as tar:
                for name, content in good.items():
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        if kind != "files":
            (folder / part).rmdir()


@pytest.mark.parametrize("kind", ["files", "webdataset", "parquet"])
def test_what_img2dataset_leaves(tmp_path: Path, kind: str) -> None:
    downloaded(tmp_path / "src", kind)
    summary = write_shards(tmp_path / "src", tmp_path / "out", processes=1)
    assert (summary.written, summary.classes, len(summary.rejected)) == (2, (), 2 if kind == "parquet" else 0)
    assert {label for label, _ in stored(tmp_path / "out").values()} == {-1}
    passed = {"files": 8, "webdataset": 8, "parquet": 2}[kind]
    assert len(summary.skipped) == passed
