"""The file beside a manifest that all processes map: when it is taken, when made anew, and what it may never do."""

import hashlib
import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from simclr_dist.convert.verify import verify_shards
from simclr_dist.data import index as index_module
from simclr_dist.data.collection import load_collection
from simclr_dist.data.columns import Sides
from simclr_dist.data.index import INDEX_NAME
from simclr_dist.data.manifest import MANIFEST_NAME, Manifest, ManifestRow, load_manifest, read_manifest, write_manifest
from simclr_dist.data.reader import ShardDataset
from simclr_dist.data.remote.cache import CacheSettings
from simclr_dist.system.errors import DataError
from small_shards import serve, write_small_shards

COLUMNS = ("offset", "size", "label", "width", "height", "sha256")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has an entry for each index that is made."""
    times: list[int] = []
    make = index_module._make
    monkeypatch.setattr(index_module, "_make", lambda *arguments: (times.append(1), make(*arguments)))
    return times


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_small_shards(tmp_path / "shards", [3, 4, 5])


def rows_of(count: int, shard: Callable[[int], str]) -> Iterator[ManifestRow]:
    """Of no images: keys of every length and script, sizes of every kind."""
    for k in range(count):
        key = f"{k}-" + "aé漢🐈"[k % 4] * (k % 7)
        hashed = hashlib.sha256(key.encode()).digest()
        yield ManifestRow(key, shard(k), 512 * k, 1 + k % 500, k % 5 - 1, 1 + k % 31, 1 + k * 7 % 37, hashed)


def test_what_it_holds_is_what_the_parquet_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In many batches and row groups. The digest is the one that runs were begun with."""
    monkeypatch.setattr(index_module, "_ROWS", 100)
    names, rows = ["a.tar", "b.tar"], list(rows_of(1234, lambda k: "ab"[k >= 700] + ".tar"))
    for name in names:
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 10**6)
    write_manifest(tmp_path, names, rows, classes := ["w", "x", "ü", "z"])
    table = pq.read_table(tmp_path / MANIFEST_NAME)
    pq.write_table(table, tmp_path / MANIFEST_NAME, row_group_size=321)
    for _ in range(2):
        manifest = load_manifest(tmp_path)
        assert (manifest.shard_sizes.tolist(), manifest.shard_bytes.tolist()) == ([700, 534], [10**6] * 2)
        assert manifest.key.tolist() == [row.key for row in rows]
        for name in COLUMNS[:-1]:
            assert getattr(manifest, name).tolist() == [getattr(row, name) for row in rows], name
        assert manifest.sha256.tobytes() == b"".join(row.sha256 for row in rows)
        content = json.dumps([[row.key for row in rows], classes]).encode() + manifest.sha256.tobytes()
        assert manifest.digest == hashlib.sha256(content + manifest.label.astype("<i8").tobytes()).hexdigest()
        assert manifest.short_side == np.median(np.minimum(manifest.width, manifest.height))
        assert manifest.pixels == sum(row.width * row.height for row in rows)
        assert [manifest.shard_of(row) for row in (0, 699, 700, 1233)] == [0, 0, 1, 1]
        with pytest.raises(ValueError, match="read-only"):
            manifest.label[0] = 1


def test_keys_are_had_by_row_slice_and_array(shards: Path) -> None:
    key = load_manifest(shards).key
    assert (key[2], key[np.int64(2)], key[-1], len(key)) == ("000002", "000002", "000011", 12)
    assert key[3:5].tolist() == key[np.array([3, 4])].tolist() == key[[3, 4]].tolist() == ["000003", "000004"]
    assert key[np.arange(12) > 10].tolist() == ["000011"]
    assert key[5:5].tolist() == []
    with pytest.raises(IndexError):
        key[12]


@pytest.mark.parametrize("sides", [[3], [3, 4], [9, 1, 1], [2, 2, 5, 7], [2**31 - 1, 2**31 - 1]])
def test_the_median_of_counted_sides(sides: list[int]) -> None:
    counted, square = Sides(), np.array(sides, dtype=np.int32)
    for side in square:
        counted.add(np.array([side]), np.array([2**31 - 1], dtype=np.int32))
    assert counted.median() == np.median(square)
    assert counted.pixels == sum(sides) * (2**31 - 1)


def test_it_is_made_once_and_then_taken_without_a_look_at_the_parquet(
    shards: Path, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_manifest(shards)
    old = (shards / MANIFEST_NAME).stat().st_mtime_ns - 10**10
    os.utime(shards / MANIFEST_NAME, ns=(old, old))
    assert load_manifest(shards).digest == first.digest  # its bytes are those; noted
    monkeypatch.setattr(index_module.time, "time_ns", lambda: 2 * parquet_mark(shards))  # so old that nobody is changing it
    load_manifest(shards)
    assert (shards / INDEX_NAME).stat().st_mtime_ns == parquet_mark(shards)
    monkeypatch.setattr(index_module.hashlib, "file_digest", lambda *_: pytest.fail("reads it"))
    assert load_manifest(shards).digest == first.digest
    assert made == [1]


def parquet_mark(folder: Path) -> int:
    about = (folder / MANIFEST_NAME).stat()
    return max(about.st_mtime_ns, about.st_ctime_ns) + 10**9


def test_a_copy_is_recognised_by_its_content(shards: Path, tmp_path: Path, made: list[int]) -> None:
    digest = load_manifest(shards).digest
    shutil.copytree(shards, tmp_path / "copy", copy_function=shutil.copyfile)
    assert load_manifest(tmp_path / "copy").digest == digest
    assert made == [1]


@pytest.mark.parametrize("times", ["new", "old"])
def test_another_manifest_of_the_same_size_is_noticed(shards: Path, tmp_path: Path, made: list[int], times: str) -> None:
    """Written over it, or moved there from a backup with its old times."""
    other = pq.read_table(shards / MANIFEST_NAME)
    pq.write_table(other, shards / MANIFEST_NAME, compression="none")
    before = load_manifest(shards)
    label = np.roll(other.column("label").to_numpy(), 1)
    column = other.schema.get_field_index("label")
    pq.write_table(other.set_column(column, other.schema.field(column), [label]), tmp_path / "other", compression="none")
    assert (tmp_path / "other").stat().st_size == (shards / MANIFEST_NAME).stat().st_size, "else it would be too easy"
    if times == "old":
        os.utime(tmp_path / "other", ns=(10**18, 10**18))
        (tmp_path / "other").replace(shards / MANIFEST_NAME)
    else:
        (shards / MANIFEST_NAME).write_bytes((tmp_path / "other").read_bytes())
    after = load_manifest(shards)
    assert after.label.tolist() == label.tolist()
    assert after.digest != before.digest
    assert made == [1, 1]
    assert before.label.tolist() == np.roll(label, -1).tolist(), "who has mapped the old one keeps it"


def test_a_manifest_that_is_damaged_later_is_refused_as_ever(shards: Path) -> None:
    load_manifest(shards)
    content = bytearray((shards / MANIFEST_NAME).read_bytes())
    content[-20] ^= 0xFF
    (shards / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(DataError, match=r"^[^\n]*not a (readable Parquet file|manifest)[^\n]*$"):
        load_manifest(shards)


def test_any_damage_of_its_end_and_any_other_length_is_noticed(shards: Path, made: list[int]) -> None:
    manifest, path = load_manifest(shards), shards / INDEX_NAME
    whole = path.read_bytes()
    header = len(whole) - whole.index(b'{"names"')
    random = np.random.default_rng(0)
    damaged = [whole[:-1], whole[:10], b"", whole + b"\0", whole[1:], whole[: len(whole) // 2] + whole[len(whole) // 2 + 1 :]]
    places = {*random.integers(len(whole) - header, len(whole), 60).tolist(), *range(len(whole) - 48, len(whole))}
    damaged += [whole[:k] + bytes([whole[k] ^ 1 << random.integers(8)]) + whole[k + 1 :] for k in places]
    for number, content in enumerate(damaged, 2):
        path.write_bytes(content)
        again = load_manifest(shards)
        assert (again.digest, again.label.tolist()) == (manifest.digest, manifest.label.tolist())
        assert len(made) == number
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "change",
    [
        {"names": ["../a.tar", "b.tar", "c.tar"]}, {"names": ["a.tar", "a.tar", "b.tar"]}, {"names": ["a.tar"]}, {"names": 3},
        {"names": [["a"], "b", "c"]}, {"samples": [3, 4, -5]}, {"samples": [2**63, 4, 5]}, {"samples": [3, [4], 5]},
        {"samples": [3, 4, 50]}, {"bytes": [1]}, {"key_bytes": 10**9}, {"classes": None}, {"pixels": None}, {"short_side": "x"},
    ],
)  # fmt: skip
def test_an_index_of_others_cannot_lead_astray(shards: Path, change: dict[str, Any], made: list[int]) -> None:
    """One whose checksums are right, as somebody who wants harm would write it."""
    expected, path = load_manifest(shards).shards, shards / INDEX_NAME
    whole = path.read_bytes()
    _, size, magic = index_module._END.unpack(whole[-index_module._END.size :])
    columns, header = whole[: -size - index_module._END.size], json.loads(whole[-size - index_module._END.size : -48])
    text = json.dumps(header | change).encode()
    path.write_bytes(columns + text + index_module._END.pack(hashlib.sha256(text).digest(), len(text), magic))
    assert load_manifest(shards).shards == expected
    assert len(made) == 2


def test_a_damaged_column_costs_one_line_and_verify_finds_it(images: Path, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(images, tmp_path / "shards"))
    expected, path = ShardDataset(shards).read(5), shards / INDEX_NAME
    content = bytearray(path.read_bytes())
    place = content.index(load_manifest(shards).size.tobytes()) + 8 * 5
    content[place : place + 8] = (2**62).to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"^{shards}/shard-000000.tar: image [^\n]*{INDEX_NAME} is damaged[^\n]*$"):
        ShardDataset(shards).read(5)
    lines: list[str] = []
    assert verify_shards(shards, processes=1, report=lines.append).bad == 0
    assert lines == [f"{path}: is damaged, and is removed; the next start makes it anew"]
    assert ShardDataset(shards).read(5) == expected
    assert verify_shards(shards, processes=1, report=lines.append).lines == 0
    assert len(lines) == 1


def unwritable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a read-only disk, for root too."""
    replacing = index_module.replacing

    def refuse(path: Path, *arguments: Any, **how: Any) -> Any:
        if path.is_relative_to(folder):
            raise OSError(30, "Read-only file system", str(path))
        return replacing(path, *arguments, **how)

    monkeypatch.setattr(index_module, "replacing", refuse)


def test_where_the_folder_takes_none_it_is_in_the_cache(
    shards: Path, tmp_path: Path, made: list[int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    unwritable(shards, monkeypatch)
    cache = CacheSettings(tmp_path / "cache", 1 << 30)
    manifests = [load_collection(shards, cache=cache) for _ in range(3)]
    (file,) = (tmp_path / "cache").rglob("*.index")
    assert manifests[2].label.tolist() == manifests[0].label.tolist()
    assert not (shards / INDEX_NAME).exists()
    file.write_bytes(file.read_bytes()[:-1])
    assert load_collection(shards, cache=cache).digest == manifests[0].digest
    assert made == [1, 1]
    assert capfd.readouterr() == ("", "")


def test_without_any_place_it_says_so_and_works(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    unwritable(tmp_path, monkeypatch)
    dataset = ShardDataset(shards, cache=CacheSettings(tmp_path / "cache", 1 << 30))
    assert dataset[4].label == 1
    line = f"WARNING: {shards}/{MANIFEST_NAME}: each process reads it into its memory, as no index can be kept in {shards} and"
    assert capfd.readouterr().err == f"{line} {tmp_path}/cache/manifests\n"


def test_a_full_disk_is_no_error_and_leaves_nothing(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(index_module.os, "statvfs", lambda _: os.statvfs_result((4096, 4096, 9, 0, 0, 0, 0, 0, 0, 255)))
    with pytest.raises(OSError, match="No space left"), (shards / MANIFEST_NAME).open("rb") as file:
        index_module._make_there(shards / INDEX_NAME, index_module.Parquet(file, "it"))
    index_module.write_index(shards / MANIFEST_NAME)
    assert {path.suffix for path in shards.iterdir()} == {".tar", ".parquet"}
    assert capfd.readouterr().err == ""


def test_remote_manifests_are_in_the_cache_by_content(shards: Path, tmp_path: Path, made: list[int]) -> None:
    cache = CacheSettings(tmp_path / "cache", 1 << 30)
    with serve(shards) as server:
        first, second = (load_collection(server.url, cache=cache) for _ in range(2))
        assert second.digest == first.digest == load_collection(f"{server.url}/", cache=cache).digest
    with serve(shards) as elsewhere:
        assert load_collection(elsewhere.url, cache=cache).key.tolist() == first.key.tolist()
    assert made == [1]
    assert [path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [".index"], "the download is gone"


MANY = """
import sys
from pathlib import Path
from simclr_dist.data import index
from simclr_dist.data.manifest import read_manifest
made, make = [], index._make
index._make = lambda *arguments: made.append(make(*arguments))
print("ready", flush=True)
sys.stdin.readline()
print(read_manifest(Path(sys.argv[1])).digest, len(made))
"""


def test_processes_that_start_together_make_one(tmp_path: Path) -> None:
    names = ["a.tar"]
    (tmp_path / "a.tar").touch()
    os.truncate(tmp_path / "a.tar", 10**9)
    write_manifest(tmp_path, names, list(rows_of(20_000, lambda _: "a.tar")), ())
    pipes: dict[str, Any] = {"stdin": -1, "stdout": -1, "text": True}
    started = [subprocess.Popen([sys.executable, "-c", MANY, str(tmp_path)], **pipes) for _ in range(3)]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    digests, made = zip(*(process.communicate()[0].split() for process in started), strict=True)
    assert len(set(digests)) == 1
    assert sorted(made) == ["0", "0", "1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", INDEX_NAME, MANIFEST_NAME]


def test_one_that_is_mapped_is_not_replaced_by_its_like(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no locks, two make one each. A reader on another machine would lose the file that goes."""
    make, path = index_module._make, shards / INDEX_NAME

    def overtaken(*arguments: Any) -> None:
        make(*arguments)
        monkeypatch.setattr(index_module, "_make", make)
        load_manifest(shards)

    def no_locks(*_: Any, **__: Any) -> bool:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(index_module, "lock", no_locks)
    monkeypatch.setattr(index_module, "_make", overtaken)
    inodes: list[int] = []
    wanted = index_module._read
    monkeypatch.setattr(
        index_module, "_read", lambda *a: (inodes.append(path.stat().st_ino) if path.exists() else None, wanted(*a))[1]
    )
    assert load_manifest(shards).label.tolist() == [k % 3 for k in range(12)]
    assert len(set(inodes)) == 1


@pytest.mark.parametrize("mode", [0o640, 0o664])
def test_who_may_read_the_manifest_may_read_it(shards: Path, mode: int) -> None:
    (shards / MANIFEST_NAME).chmod(mode)
    before = os.umask(0o077)
    try:
        load_manifest(shards)
    finally:
        os.umask(before)
    assert stat.S_IMODE((shards / INDEX_NAME).stat().st_mode) == mode


def test_pickled_it_is_whole(shards: Path) -> None:
    manifest: Manifest = pickle.loads(pickle.dumps(load_manifest(shards)))
    assert manifest.key.tolist() == load_manifest(shards).key.tolist()


def test_a_start_holds_nothing_of_the_images(tmp_path: Path) -> None:
    """Neither those of the folder nor of tars in a row: 40,000 rows are 3 MB."""
    names = [f"{number}.tar" for number in range(8)]
    for name in names:
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 10**9)
    write_manifest(tmp_path, names, list(rows_of(40_000, lambda k: names[k // 5000])), ())
    read_manifest(tmp_path)
    tracemalloc.start()
    try:
        whole = load_collection(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 600_000
        part = load_collection(f"{tmp_path}/{{2..5}}.tar")
        assert tracemalloc.get_traced_memory()[0] < 600_000
    finally:
        tracemalloc.stop()
    assert part.key[:5].tolist() == whole.key[10_000:10_005].tolist()


@pytest.mark.parametrize("column", ["label", "key"])
def test_who_uses_labels_and_keys_meets_no_damaged_ones(images: Path, tmp_path: Path, column: str) -> None:
    """The header's digest would vouch for them. Who trains reads neither, and compares nothing."""
    shards = Path(shutil.copytree(images, tmp_path / "shards"))
    manifest, path = load_manifest(shards), shards / INDEX_NAME
    labels = manifest.label.tolist()  # a mapped file is what is written into
    whole = manifest.key.parts[2].tobytes() if column == "key" else manifest.label.tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(whole)] ^= 1
    path.write_bytes(content)
    ShardDataset(shards)
    with pytest.raises(DataError, match=rf"^{shards}: labels or keys [^\n]*its index is damaged; `simclr-dist shard --verify"):
        ShardDataset(shards, checked=True)
    lines: list[str] = []
    verify_shards(shards, processes=1, report=lines.append)
    assert lines == [f"{path}: is damaged, and is removed; the next start makes it anew"]
    assert ShardDataset(shards, checked=True).manifest.label.tolist() == labels


def test_a_damaged_one_in_the_cache_is_found_too(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = Path(shutil.copytree(images, tmp_path / "shards"))
    (shards / INDEX_NAME).unlink(missing_ok=True)
    unwritable(shards, monkeypatch)
    monkeypatch.setenv("SIMCLR_DIST_CACHE", str(tmp_path / "cache"))
    manifest = ShardDataset(shards).manifest
    (path,) = (tmp_path / "cache").rglob("*.index")
    content = bytearray(path.read_bytes())
    content[content.index(manifest.sha256.tobytes())] ^= 1
    path.write_bytes(content)
    lines: list[str] = []
    verify_shards(shards, processes=1, report=lines.append)
    assert lines == [f"{path}: is damaged, and is removed; the next start makes it anew"]
    assert not path.exists()


def test_one_that_cannot_be_read_is_left_alone(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's, or a disk that stutters: a reader of it may lose it if it is replaced."""
    load_manifest(shards)
    before = (shards / INDEX_NAME).stat().st_ino
    mapped = index_module._mapped

    def unmapped(file: Any) -> Any:
        if file.name == str(shards / INDEX_NAME):
            raise PermissionError(13, "Permission denied")
        return mapped(file)

    monkeypatch.setattr(index_module, "_mapped", unmapped)
    assert load_collection(shards, cache=CacheSettings(tmp_path / "cache", 1 << 30)).label.tolist() == [
        k % 3 for k in range(12)
    ]
    assert (shards / INDEX_NAME).stat().st_ino == before
    assert len(list((tmp_path / "cache").rglob("*.index"))) == 1


def test_without_locks_the_first_one_stays(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a process that does not see it yet, as on a network disk."""
    expected = load_manifest(shards).label.tolist()
    before = (shards / INDEX_NAME).stat().st_ino
    monkeypatch.setattr(index_module.Path, "exists", lambda _: False)
    read, blind = index_module._read, iter([None] * 4)
    monkeypatch.setattr(index_module, "_read", lambda *a: next(blind, 1) and read(*a))
    with (shards / MANIFEST_NAME).open("rb") as file:
        fields = index_module.open_index(index_module.Parquet(file, "it"), shards / INDEX_NAME, None)
    assert fields["label"].tolist() == expected
    assert (shards / INDEX_NAME).stat().st_ino == before


def test_one_of_a_manifest_that_is_replaced_meanwhile_is_not_put_in_place(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = index_module._make

    def slow(*arguments: Any) -> None:
        make(*arguments)
        copy = shards / "copy"
        shutil.copyfile(shards / MANIFEST_NAME, copy)
        copy.replace(shards / MANIFEST_NAME)

    monkeypatch.setattr(index_module, "_make", slow)
    with pytest.raises(OSError, match="replaced meanwhile"), (shards / MANIFEST_NAME).open("rb") as file:
        index_module._make_there(shards / INDEX_NAME, index_module.Parquet(file, "it"))
    assert not (shards / INDEX_NAME).exists()


def test_rows_count_from_the_end_too(images: Path) -> None:
    dataset = ShardDataset(images)
    assert dataset[-1].row == len(dataset) - 1
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_that_of_a_conversion_is_known_to_other_users_at_once(shards: Path) -> None:
    index_module.write_index(shards / MANIFEST_NAME)
    assert (shards / INDEX_NAME).stat().st_mtime_ns == parquet_mark(shards)
