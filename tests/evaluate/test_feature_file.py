"""Features on disk: what is written is read, by us and by others; what is not ours, damaged or of something else is refused."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simclr_dist.evaluate.features.file import About, is_feature_file, read_features, write_features
from simclr_dist.system.errors import DataError

SHAPE = {"encoder": "resnet10", "width": 1, "stem": "small_stride2", "feature_size": 5}
ABOUT = About("ab" * 32, SHAPE, "h", 16, "fp32", "cd" * 32, ("cat", "dog"))
KEYS = ["a/1.jpg", "a/2.jpg", "b/ü.png"]
LABELS = np.array([0, -1, 1])
H = np.arange(15, dtype=np.float32).reshape(3, 5) / 7


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "features.parquet"
    write_features(path, KEYS, LABELS, H, ABOUT)
    return path


def test_what_is_written_is_read(path: Path) -> None:
    table = read_features(path)
    assert table.key == tuple(KEYS)
    assert table.about == ABOUT
    assert np.array_equal(table.label, LABELS)
    assert table.label.dtype == np.int64
    assert np.array_equal(table.embedding, H)
    assert table.embedding.dtype == np.float32
    assert is_feature_file(path)


def test_raw_pixels_stay_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simclr_dist.evaluate.features.file._ROW_GROUP_BYTES", 40)
    pixels = np.arange(120, dtype=np.uint8).reshape(3, 40)
    write_features(tmp_path / "f.parquet", KEYS, LABELS, pixels, ABOUT)
    found = read_features(tmp_path / "f.parquet").embedding
    assert found.dtype == np.uint8
    assert np.array_equal(found, pixels)
    assert pq.ParquetFile(tmp_path / "f.parquet").num_row_groups == 3


def test_what_fails_half_way_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full after the first 64 MiB."""
    whole = path.read_bytes()
    monkeypatch.setattr("simclr_dist.evaluate.features.file._ROW_GROUP_BYTES", 40)
    written = []

    def fails(self: pq.ParquetWriter, table: pa.Table, **_: Any) -> None:
        written.append(len(table))
        if len(written) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", fails)
    with pytest.raises(DataError, match="cannot write the features: No space left on device"):
        write_features(path, KEYS, LABELS, H + 1, ABOUT)
    assert path.read_bytes() == whole
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_columns_are_those_promised(path: Path) -> None:
    schema = pq.read_schema(path)
    assert schema.names == ["key", "label", "embedding"]
    assert [field.type for field in schema][:2] == [pa.string(), pa.int64()]
    kind = schema.field("embedding").type
    assert (kind.list_size, kind.value_type) == (5, pa.float32())
    assert pq.read_table(path).column("label").to_pylist() == [0, None, 1]


def test_several_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simclr_dist.evaluate.features.file._ROW_GROUP_BYTES", 40)
    write_features(tmp_path / "f.parquet", KEYS, LABELS, H, ABOUT)
    assert pq.ParquetFile(tmp_path / "f.parquet").num_row_groups == 2
    table = read_features(tmp_path / "f.parquet")
    assert table.key == tuple(KEYS)
    assert np.array_equal(table.embedding, H)
    assert np.array_equal(table.label, LABELS)


def test_the_same_input_gives_the_same_bytes_and_replaces_the_old(path: Path, tmp_path: Path) -> None:
    write_features(tmp_path / "again.parquet", KEYS, LABELS, H, ABOUT)
    assert path.read_bytes() == (tmp_path / "again.parquet").read_bytes()
    write_features(path, KEYS, LABELS, H + 1, ABOUT)
    assert np.array_equal(read_features(path).embedding, H + 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.parquet", "features.parquet"]


def test_pandas_reads_it(path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_parquet(path)
    assert frame["key"].tolist() == KEYS
    assert frame["label"].fillna(-1).tolist() == LABELS.tolist()
    assert np.array_equal(np.stack(frame["embedding"]), H)


def test_polars_reads_it(path: Path) -> None:
    polars = pytest.importorskip("polars")
    frame = polars.read_parquet(path)
    assert frame["key"].to_list() == KEYS
    assert frame["label"].to_list() == [0, None, 1]
    assert frame.schema["embedding"] == polars.Array(polars.Float32, 5)
    assert np.array_equal(frame["embedding"].to_numpy(), H)


def test_duckdb_reads_it(path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    rows = duckdb.sql(f"select key, label, embedding::float[5], array_length(embedding::float[]) from '{path}'").fetchall()
    assert [row[:2] for row in rows] == [("a/1.jpg", 0), ("a/2.jpg", None), ("b/ü.png", 1)]
    assert np.array_equal(np.array([row[2] for row in rows], dtype=np.float32), H)
    assert {row[3] for row in rows} == {5}
    query = f"select array_cosine_similarity(a.embedding::float[5], b.embedding::float[5]) from '{path}' a, '{path}' b"
    ((cosine,),) = duckdb.sql(query + " where a.key = 'a/1.jpg' and b.key = 'a/2.jpg'").fetchall()
    assert cosine == pytest.approx(H[0] @ H[1] / np.linalg.norm(H[0]) / np.linalg.norm(H[1]))


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_features(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    return line


def test_files_that_are_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    assert "no such file of features" in refusal(path)
    assert not is_feature_file(path)
    path.write_bytes(b"no parquet")
    assert "not a readable file" in refusal(path)
    assert not is_feature_file(path)
    table = pa.table({"key": ["a"], "label": [1], "embedding": [[1.0]]})
    for metadata in (
        {},
        {"simclr_dist": "no json"},
        {"simclr_dist": '{"format": "simclr_dist.manifest"}'},
        {"simclr_dist": "3"},
    ):
        pq.write_table(table.replace_schema_metadata(metadata), path)
        assert "not a file of features" in refusal(path)
        assert not is_feature_file(path)
    pq.write_table(table.replace_schema_metadata({"simclr_dist": '{"format": "simclr_dist features 2"}'}), path)
    assert "its format is 'simclr_dist features 2'" in refusal(path)


def test_columns_that_are_not_ours(path: Path) -> None:
    table = pq.read_table(path)
    for other in (table.drop_columns("label"), table.slice(0, 0), table.rename_columns(["id", "label", "embedding"])):
        pq.write_table(other, path)
        assert "not a file of features" in refusal(path)
    changed = table.set_column(1, table.schema.field("label"), pa.chunked_array([pa.array([0, 2, 1])]))
    pq.write_table(changed, path)
    assert "a label or a key that cannot be" in refusal(path)


def test_every_flipped_bit_of_the_data_is_seen(path: Path) -> None:
    whole = path.read_bytes()
    with pq.ParquetFile(path) as file:
        column = file.metadata.row_group(0).column(2)
    end = column.data_page_offset + column.total_compressed_size
    for place in range(end - H.nbytes, end):  # the values themselves, without compression
        content = bytearray(whole)
        content[place] ^= 4
        path.write_bytes(content)
        assert "not a readable file of features" in refusal(path)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    with pytest.raises(DataError, match="'b' stands for two images"):
        write_features(path, ["a", "b", "b"], LABELS, H, ABOUT)
    with pytest.raises(DataError, match="no features to write"):
        write_features(path, [], LABELS[:0], H[:0], ABOUT)
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'none' / 'f.parquet'}: cannot write the features")):
        write_features(tmp_path / "none" / "f.parquet", KEYS, LABELS, H, ABOUT)
    assert list(tmp_path.iterdir()) == []


def test_arrays_for_numpy(tmp_path: Path) -> None:
    """Read without pickle; the same names as in Parquet; the same bytes again."""
    path = tmp_path / "f.npz"
    write_features(path, KEYS, LABELS, H, ABOUT, ["one.jpg", None, "two.jpg"])
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    assert list(arrays) == ["simclr_dist", "key", "class_name", "source", "label", "embedding"]
    assert arrays["key"].tolist() == KEYS
    assert arrays["class_name"].tolist() == ["cat", "", "dog"]
    assert arrays["source"].tolist() == ["one.jpg", "", "two.jpg"]
    assert np.array_equal(arrays["label"], LABELS)
    assert (arrays["embedding"].dtype, arrays["embedding"].tobytes()) == (np.float32, H.tobytes())
    assert json.loads(str(arrays["simclr_dist"]))["encoder_sha256"] == ABOUT.encoder_sha256
    before = path.read_bytes()
    assert is_feature_file(path)
    write_features(path, KEYS, LABELS, H, ABOUT, ["one.jpg", None, "two.jpg"])
    assert path.read_bytes() == before
    np.savez(foreign := tmp_path / "x.npz", embedding=H)
    assert not is_feature_file(foreign)
    assert not is_feature_file(tmp_path / "none.npz")
    with pytest.raises(DataError, match="cannot write the features"):
        write_features(tmp_path / "no" / "f.npz", KEYS, LABELS, H, ABOUT)
