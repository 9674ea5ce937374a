"""Tars of others: a manifest beside them that the reader can use; and shards compared with their manifest."""

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pictures import contents, encoded
from simclr_dist.cli.main import main
from simclr_dist.convert.index import index_shards
from simclr_dist.convert.shards import write_shards
from simclr_dist.convert.verify import verify_shards
from simclr_dist.data.index import INDEX_NAME
from simclr_dist.data.manifest import MANIFEST_NAME, load_manifest
from simclr_dist.data.reader import ShardDataset
from simclr_dist.system.errors import DataError


def write_tar(path: Path, members: list[tuple[str, bytes]], kind: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def sample(key: str, seed: int, label: int | None = None, kind: str = "png") -> list[tuple[str, bytes]]:
    members = [(f"{key}.{kind}", encoded(seed, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[kind]))]
    return members + ([(f"{key}.cls", str(label).encode())] if label is not None else []) + [(f"{key}.json", b"{}")]


def deep() -> bytes:
    target = io.BytesIO()
    Image.fromarray(np.arange(24 * 16, dtype=np.uint16).reshape(16, 24) * 170).save(target, "PNG")
    return target.getvalue()


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_others_can_be_trained_on(tmp_path: Path, kind: int) -> None:
    long = "deep/" * 15 + "y" * 20 if kind == tarfile.USTAR_FORMAT else "deep/" * 60 + "y" * 150
    tars = [
        write_tar(tmp_path / "a.tar", [*sample("x/0", 0, 5), *sample("x/1", 1, None, "jpg")], kind),
        write_tar(tmp_path / "b.tar", [*sample("./2", 2, 0, "webp"), *sample(long, 3, -1)], kind),
    ]
    before = [path.read_bytes() for path in tars]
    summary = index_shards(tmp_path, processes=1)
    assert (summary.images, summary.labelled, summary.shards, summary.rejected) == (4, 2, 2, ())
    assert [path.read_bytes() for path in tars] == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar", INDEX_NAME, MANIFEST_NAME]
    manifest = load_manifest(tmp_path)
    assert manifest.key.tolist() == ["x/0", "x/1", "2", long]
    assert manifest.label.tolist() == [5, -1, 0, -1]
    data = ShardDataset(tmp_path)
    assert data.read(0) == encoded(0)
    assert data.read(1) == encoded(1, "JPEG")
    assert [tuple(data[row].image.shape) for row in range(4)] == [(3, 16, 24)] * 4


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_tars_that_webdataset_wrote(tmp_path: Path) -> None:
    from webdataset import TarWriter

    with TarWriter(str(tmp_path / "a.tar")) as tar:  # its own defaults: PAX headers with times
        for i in range(3):
            tar.write({"__key__": f"{i:04d}", "jpg": encoded(i, "JPEG"), "cls": i, "json": {"a": 1}})
    assert index_shards(tmp_path, processes=1).images == 3
    assert load_manifest(tmp_path).label.tolist() == [0, 1, 2]
    assert verify_shards(tmp_path, processes=1, decode=True).lines == 0


def test_keys_that_two_tars_share(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", [*sample("0", ord(name)), *sample(f"only-{name}", 1)])
    assert index_shards(tmp_path, processes=1).images == 4
    assert load_manifest(tmp_path).key.tolist() == ["a.tar/0", "a.tar/only-a", "b.tar/0", "b.tar/only-b"]
    assert verify_shards(tmp_path, processes=1).lines == 0


@pytest.mark.parametrize("labels_first", [False, True])
def test_labels_may_lie_apart_from_their_images(tmp_path: Path, labels_first: bool) -> None:
    both = [sample(str(number), number, number + 3) for number in range(5)]
    apart = [[member for one in both for member in one if member[0].endswith(".cls") is last] for last in (False, True)]
    others = [(f"{number}.json", b"{}") for number in range(5)]
    write_tar(tmp_path / "a.tar", [*(apart[1] + apart[0] if labels_first else apart[0] + apart[1]), *others])
    summary = index_shards(tmp_path, processes=1)
    assert (summary.images, summary.rejected) == (5, ())
    assert load_manifest(tmp_path).label.tolist() == [3, 4, 5, 6, 7]
    assert verify_shards(tmp_path, processes=1).lines == 0


def test_of_several_labels_of_a_key_the_first_counts_whoever_reads(tmp_path: Path) -> None:
    members = [("0.png", encoded(0)), *sample("1", 1, 5), ("0.png", encoded(2)), ("0.cls", b"3"), ("0.cls", b"4")]
    path = write_tar(tmp_path / "tars" / "a.tar", members)
    assert index_shards(path.parent, processes=1).images == 2
    write_shards(path, tmp_path / "out", processes=1, seed=0)
    assert sorted(load_manifest(path.parent).label) == sorted(load_manifest(tmp_path / "out").label) == [3, 5]
    assert verify_shards(path.parent, processes=1).lines == 0


def test_what_cannot_be_used_is_left_out_and_listed(tmp_path: Path) -> None:
    turned = encoded(0, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0")
    write_tar(
        tmp_path / "a.tar",
        [
            *sample("good", 0, 1), *sample("good2", 1), *sample("good", 2),
            ("turned.jpg", turned), ("cmyk.jpg", encoded(0, "JPEG", mode="CMYK")), ("pal.png", encoded(0, mode="P")),
            ("deep.png", deep()), ("text.jpg", b"hello"), ("empty.png", b""), ("meta.json", b"{}"),
            ("label.png", encoded(5)), ("label.cls", b"cat"), ("two.png", encoded(1)), ("two.jpg", encoded(1, "JPEG")),
            ("mask.jpg", encoded(6, "JPEG")), ("mask.seg.png", encoded(7, mode="L")), ("._x.png", b"mac"),
            ("../up.png", encoded(1)), ("/abs.png", encoded(1)),
        ],
    )  # fmt: skip
    summary = index_shards(tmp_path, processes=1)
    reasons = {problem.name.removeprefix("a.tar/"): problem.reason for problem in summary.rejected}
    assert load_manifest(tmp_path).key.tolist() == ["good", "good2", "mask"]
    cure = "; `simclr-dist shard a.tar DST` converts it"
    assert reasons == {
        "good": "its key comes twice in the tar",
        "turned": f"rotated by its EXIF block{cure}",
        "cmyk": f"pixels of mode CMYK{cure}",
        "pal": f"pixels of mode P{cure}",
        "deep": f"16 bits a channel{cure}",
        "text": "not an image",
        "empty": "an empty file",
        "meta": "no image among its files",
        "label": "cls: 'cat' is no label; it takes an integer from 0, or -1",
        "two": "2 images of one key: two.png, two.jpg",
        "../up.png": "a path that leads out ('..')",
        "/abs.png": "an absolute path",
    }
    listed = [json.loads(line)["source"] for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert len(listed) == len(reasons)
    assert verify_shards(tmp_path, processes=1).unlisted > 0
    (tmp_path / MANIFEST_NAME).unlink()
    with pytest.raises(DataError, match="strict, and 12 samples cannot be used"):
        index_shards(tmp_path, processes=1, strict=True)
    assert not (tmp_path / MANIFEST_NAME).exists()


def test_nothing_is_written_for_a_damaged_tar(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", sample("0", 0))
    path = write_tar(tmp_path / "b.tar", [*sample("1", 1), *sample("2", 2)])
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(DataError, match=r"b.tar: .*\(at byte") as caught:
        index_shards(tmp_path, processes=1)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar"]


def test_folders_that_cannot_be_indexed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder of tars"):
        index_shards(tmp_path / "none")
    with pytest.raises(DataError, match=r"holds no \.tar file"):
        index_shards(tmp_path)
    write_tar(tmp_path / "outside" / "x.tar", sample("0", 0))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.tar").symlink_to(tmp_path / "gone.tar")
    with pytest.raises(DataError, match=r"holds no \.tar file that can be used: x\.tar \(a broken link\)"):
        index_shards(tmp_path / "in")
    write_tar(tmp_path / "text" / "x.tar", [("a.json", b"{}")])
    with pytest.raises(DataError, match="no image in its 1 tars can be used"):
        index_shards(tmp_path / "text", processes=1)
    index_shards(tmp_path / "outside", processes=1)
    with pytest.raises(DataError, match="is there already"):
        index_shards(tmp_path / "outside")


def test_a_list_of_others_is_not_replaced(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", sample("0", 0))
    path = tmp_path / "rejected.jsonl"
    for foreign in ("my notes", '{"image": 1}', "[1]", "\xe4"):
        path.write_text(foreign)
        with pytest.raises(DataError, match=r"rejected\.jsonl: was not written by simclr-dist; move it elsewhere$"):
            index_shards(tmp_path, processes=1)
        assert path.read_text() == foreign
    path.write_text('{"source": "x.tar/1", "reason": "not an image"}\n')  # of an index before, which was removed
    assert index_shards(tmp_path, processes=1).rejected == ()
    assert not path.exists()


@pytest.mark.slow  # starts processes
def test_the_number_of_processes_changes_no_byte(tmp_path: Path) -> None:
    for number in range(5):
        write_tar(tmp_path / "one" / f"{number}.tar", [m for i in range(9) for m in sample(f"{number}-{i}", number * 9 + i, i)])
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    index_shards(tmp_path / "one", processes=1)
    index_shards(tmp_path / "two", processes=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert verify_shards(tmp_path / "one", processes=2).images == 45


# ---- verify


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Five tars of ten labelled images each."""
    for i in range(50):
        path = tmp_path / "src" / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(i))
    write_shards(tmp_path / "src", tmp_path / "out", shard_size=10, processes=1)
    return tmp_path / "out"


def differences(folder: Path, **options: Any) -> list[str]:
    lines: list[str] = []
    summary = verify_shards(folder, processes=1, report=lines.append, **options)
    assert summary.lines == len(lines)
    assert not any("\n" in line for line in lines)
    return lines


def test_whole_shards(shards: Path) -> None:
    assert differences(shards) == differences(shards, decode=True) == []
    assert verify_shards(shards, processes=1).images == 50


def change(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


def test_each_kind_of_damage_is_one_line(shards: Path) -> None:
    manifest = load_manifest(shards)
    tars = [shards / name for name in manifest.shards]
    first = manifest.shard_sizes.cumsum() - manifest.shard_sizes
    change(tars[0], int(manifest.offset[first[0] + 2]) + 30, b"\0\1\2\3")
    change(tars[1], int(manifest.offset[first[1] + 3]) - 512, b"other")  # a name: the header's checksum is wrong now
    with tars[2].open("ab") as file:
        file.write(bytes(512))
    tars[3].unlink()
    with tarfile.open(tars[4]) as tar:
        label = next(member for member in tar if member.name.endswith(".cls"))
    change(tars[4], label.offset_data, b"7")
    lines = differences(shards)
    assert len(lines) == 5
    assert lines[0] == f"{tars[0]}: image {manifest.key[2]}: its bytes are not those of the manifest (sha256)"
    assert "is damaged, or no tar (at byte" in lines[1]
    assert f"{tars[2]}: has " in lines[2]
    assert "No such file or directory; 10 images are lost" in lines[3]
    assert "its label is 7 in the tar" in lines[4]
    summary = verify_shards(shards, processes=1, report=lambda _: None)
    assert (summary.images, summary.bad) == (50, 12)


def test_other_members_that_end_in_cls_are_no_labels(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [*sample("0", 0, 1), ("0.coarse.cls", b"7"), *sample("1", 1, 2), *sample("0", 2, 5)])
    assert len(index_shards(tmp_path, processes=1).rejected) == 1
    assert load_manifest(tmp_path).label.tolist() == [1, 2]
    assert verify_shards(tmp_path, processes=1).lines == 0


def test_labels_in_capitals_and_names_with_dots(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("A.PNG", encoded(0)), ("A.CLS", b"3"), ("././b.png", encoded(1))])
    assert index_shards(tmp_path, processes=1).images == 2
    assert load_manifest(tmp_path).label.tolist() == [3, -1]
    summary = verify_shards(tmp_path, processes=1)
    assert (summary.lines, summary.unlisted) == (0, 0)


def test_a_side_that_lost_its_manifest(shards: Path, tmp_path: Path) -> None:
    whole = tmp_path / "both"
    shutil.copytree(shards, whole / "train")
    shutil.copytree(shards, whole / "test")
    (whole / "test" / MANIFEST_NAME).unlink()
    with pytest.raises(DataError, match=r"both/test: holds tars and no manifest.parquet"):
        verify_shards(whole, processes=1)


def test_a_tar_whose_name_is_no_text(tmp_path: Path) -> None:
    write_tar(tmp_path / "\udcff.tar", sample("0", 0))
    with pytest.raises(DataError, match=r"holds no .tar file that can be used: \\udcff.tar \(a name that is no printable text"):
        index_shards(tmp_path, processes=1)


def test_a_tar_in_the_place_of_another(shards: Path) -> None:
    manifest = load_manifest(shards)
    one, two = (shards / name for name in manifest.shards[:2])
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    lines = differences(shards)
    assert sum("image " in line for line in lines) == 20


def test_decode_finds_what_hashes_cannot(tmp_path: Path) -> None:
    """Bytes as they always were, of a manifest that says another size."""
    write_tar(tmp_path / "t" / "a.tar", sample("0", 0))
    index_shards(tmp_path / "t", processes=1)
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "t" / MANIFEST_NAME
    table = pq.read_table(path)
    wrong = table.set_column(table.schema.get_field_index("width"), table.schema.field("width"), pa.array([99], pa.int32()))
    pq.write_table(wrong, path)
    assert differences(tmp_path / "t") == []
    assert differences(tmp_path / "t", decode=True)[0].endswith("image 0: is 24 x 16 (as it is), not 99 x 16")


# ---- the command line


def command(*arguments: str) -> tuple[int, str, str]:
    import contextlib

    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            code = main(["shard", *arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), error.getvalue()


def test_index_and_verify_commands(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t" / "a.tar", [*sample("0", 0, 3), *sample("1", 1), ("2.png", b"bad")])
    code, out, _ = command("--index", str(tmp_path / "t"), "--processes", "1")
    assert code == 0
    assert out.splitlines()[0] == "2 images in 1 shards, 1 with a label"
    assert "left out: a.tar/2: not an image" in out
    code, out, _ = command("--verify", str(tmp_path / "t"), "--processes", "1", "--decode")
    assert code == 0
    assert "2 images in 1 shards" in out
    assert "1 images lie in the tars and are not in the manifest" in out
    change(path, int(load_manifest(tmp_path / "t").offset[1]), b"x")
    code, out, error = command("--verify", str(tmp_path / "t"), "--processes", "1")
    assert code == 2
    assert len(out.splitlines()) == 2
    assert error == f"simclr-dist: {tmp_path / 't'}: 1 of 2 images differ from the manifest\n"


def test_verify_of_a_split(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / "src").mkdir(exist_ok=True)
        (tmp_path / "src" / f"{i}.png").write_bytes(encoded(i))
    assert command(str(tmp_path / "src"), str(tmp_path / "out"), "--split", "0.8/0.2", "--processes", "1")[0] == 0
    code, out, _ = command("--verify", str(tmp_path / "out"), "--processes", "1")
    assert (code, out.split(" in ")[0]) == (0, "20 images")
    assert "no such folder of shards" in command("--verify", str(tmp_path / "none"))[2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "usage: simclr-dist shard SRC DST, or --index DIR, or --verify DST"),
        (("src",), "usage: simclr-dist shard SRC DST"),
        (("--index", "d", "--split", "0.8/0.2"), "--split: has no effect with --index"),
        (("--index", "d", "--decode"), "--decode: has no effect with --index"),
        (("src", "--verify", "d"), "--verify: takes its folder alone; 'src' is one too many"),
        (("--verify", "d", "--index", "d"), "--verify: has no effect with --index"),
        (("src", "out", "--decode"), "--decode: has an effect with --verify only"),
        (("src", "out", "--part", "9/8"), "--part: '9/8' is not I/N"),
        (("src", "out", "--part", "0/8"), "--part: '0/8' is not I/N"),
        (("src", "out", "--part", "x"), "--part: 'x' is not I/N"),
        (("src", "out", "--part", "1/8", "--finish"), "--finish: has no effect with --part"),
        (("src", "out", "--quality", "101"), "quality: 101 must be at least 1 and at most 100"),
        (("src", "out", "--speed", "1"), "unrecognized arguments: --speed"),
    ],
)
def test_wrong_options_are_one_line(arguments: tuple[str, ...], says: str) -> None:
    code, out, error = command(*arguments)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert says in error
