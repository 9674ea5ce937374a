"""Features of a user's own images: the same from files as from shards, on any world; and every mistake in one line."""

import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import ranks
from evaluated import draw_images
from forkserver import Command
from simclr_dist.cli.main import main
from simclr_dist.convert.index import index_shards
from simclr_dist.convert.shards import write_shards
from simclr_dist.data.manifest import load_manifest
from simclr_dist.data.reader import ShardDataset
from simclr_dist.encoder.file import file_digest, load_encoder
from simclr_dist.evaluate.embed import embed, embed_within
from simclr_dist.evaluate.features.extraction import extract
from simclr_dist.evaluate.features.file import About, read_features, write_features
from simclr_dist.evaluate.settings import EmbedSettings
from simclr_dist.evaluate.sources import find_images
from simclr_dist.method.distributed import World
from simclr_dist.system.errors import ConfigError, DataError, RankError

Make = Callable[..., Path]
NONE = EmbedSettings(workers=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Class folders, one with a folder inside; images of every kind that is re-encoded and of the kinds that are not."""
    images, _ = draw_images(7, seed=0)
    pictures = [Image.fromarray(image) for image in images]
    root = tmp_path / "images"
    for name in ("cat/new", "dog"):
        (root / name).mkdir(parents=True)
    pictures[0].save(root / "cat" / "b.png")
    pictures[1].save(root / "cat" / "a.jpg")
    pictures[2].save(root / "cat" / "new" / "c.webp", lossless=True)
    pictures[3].convert("L").save(root / "dog" / "gray.jpg")
    pictures[4].convert("P").save(root / "dog" / "palette.gif")
    pictures[5].convert("CMYK").save(root / "dog" / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures[6].save(root / "dog" / "turned.jpg", exif=exif)
    return root


KEYS = ("cat/a.jpg", "cat/b.png", "cat/new/c.webp", "dog/cmyk.jpg", "dog/gray.jpg", "dog/palette.gif", "dog/turned.jpg")


def test_shards(make_encoder: Make, make_shards: Make, tmp_path: Path) -> None:
    images, labels = draw_images(13, seed=0)
    shards, encoder, out = make_shards("set", images, [-1, *labels[1:]]), make_encoder(), tmp_path / "new" / "f.parquet"
    done = embed(encoder, shards, out, NONE, device="cpu")
    assert done == (13, 128, 0, ())
    table, manifest = read_features(out), load_manifest(shards)
    assert table.key == tuple(manifest.key)
    assert table.label.tolist() == [-1, *labels[1:]]
    assert (table.about.data_digest, table.about.classes) == (manifest.digest, manifest.classes)
    assert table.about.encoder_sha256 == file_digest(encoder)
    assert table.about.shape == {"encoder": "resnet10", "width": 1, "stem": "small_stride2", "feature_size": 128}
    assert (table.about.layer, table.about.image_size, table.about.precision) == ("h", 16, "fp32")
    h = extract(ShardDataset(shards), {"h": load_encoder(encoder)}, {"image_size": 16, "mean": [0.5] * 3, "std": [0.25] * 3})[
        "h"
    ].h
    assert np.array_equal(table.embedding, h.numpy())


def test_files_give_what_their_shards_give(make_encoder: Make, folder: Path, tmp_path: Path) -> None:
    """Bit for bit where the encoder sees them in the same company: one by one."""
    encoder, settings = make_encoder(), EmbedSettings(batch_size=1, workers=0)
    embed(encoder, folder, tmp_path / "files.parquet", settings, device="cpu")
    write_shards(folder, tmp_path / "shards", processes=1)
    embed(encoder, tmp_path / "shards", tmp_path / "shards.parquet", settings, device="cpu")
    files, shards = read_features(tmp_path / "files.parquet"), read_features(tmp_path / "shards.parquet")
    assert files.key == KEYS
    assert files.about.classes == shards.about.classes == ("cat", "dog")
    assert files.label.tolist() == [0] * 3 + [1] * 4
    order = np.argsort(shards.key)  # a shard's key is the place among the sorted paths
    assert np.array_equal(files.embedding, shards.embedding[order])
    assert np.array_equal(files.label, shards.label[order])


def named(path: Path) -> dict[str, tuple[int | None, str | None]]:
    """Source -> label and class name."""
    table = pq.read_table(path)
    return {row["source"]: (row["label"], row["class_name"]) for row in table.drop_columns("embedding").to_pylist()}


def test_source_and_class_are_written(make_encoder: Make, folder: Path, tmp_path: Path) -> None:
    encoder, out = make_encoder(), tmp_path / "f.parquet"
    long, odd = "dog/" + "/".join(["d" * 200] * 15) + "/x.png", "dog/\udcff\u00e4.png"
    for name in (long, odd):
        path = Path(folder, os.fsdecode(os.fsencode(name)))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((folder / "cat" / "b.png").read_bytes())
    expected = {key: (0, "cat") if key.startswith("cat") else (1, "dog") for key in (*KEYS, long, "dog/\\udcff\u00e4.png")}
    embed(encoder, folder, out, NONE, device="cpu")
    assert named(out) == expected
    write_shards(folder, tmp_path / "shards", processes=1, shard_size=4)
    embed(encoder, tmp_path / "shards", out, NONE, device="cpu")
    assert named(out) == expected
    assert read_features(out).key == tuple(load_manifest(tmp_path / "shards").key), "the key stays what it was"
    shutil.copytree(folder / "cat" / "new", tmp_path / "flat")
    write_shards(tmp_path / "flat", tmp_path / "unlabelled", processes=1)
    embed(encoder, tmp_path / "unlabelled", out, NONE, device="cpu")
    assert named(out) == {"c.webp": (None, None)}


def test_tars_of_others_have_no_source(make_encoder: Make, folder: Path, tmp_path: Path) -> None:
    """No JSON, JSON of another shape, JSON that is none, and one of another image."""
    content, others = (folder / "cat" / "b.png").read_bytes(), (b"[1]", b'{"source": 1}', b"{", b"", b'{"source": "\xff"}')
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "a.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        members = [("0.png", content)]
        for number, other in enumerate(others, 1):
            members += [(f"{number}.json", other), (f"{number}.png", content)]
        for name, body in (*members, ("9.json", b'{"source": "nine"}'), ("90.png", content), ("91.png", content)):
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
    index_shards(tmp_path / "tars", processes=1)
    embed(make_encoder(), tmp_path / "tars", tmp_path / "f.parquet", NONE, device="cpu")
    assert named(tmp_path / "f.parquet") == {None: (None, None)}


def test_a_file_of_features_without_names_is_still_read(tmp_path: Path) -> None:
    about = About("ab" * 32, {}, "h", 16, "fp32", "cd" * 32, ("cat",))
    for name, source in (("without", None), ("with", ["a.png", None])):
        path = tmp_path / f"{name}.parquet"
        write_features(path, ["0", "1"], np.array([0, -1]), np.ones((2, 3), np.float32), about, source)
        assert read_features(path).key == ("0", "1")
    assert pq.read_schema(tmp_path / "without.parquet").names == ["key", "label", "embedding"]
    assert named(tmp_path / "with.parquet") == {"a.png": (0, "cat"), None: (None, None)}


def test_a_flat_folder_and_single_files(
    make_encoder: Make, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = make_encoder()
    embed(encoder, folder / "dog", tmp_path / "flat.parquet", NONE, device="cpu")
    flat = read_features(tmp_path / "flat.parquet")
    assert flat.key == ("cmyk.jpg", "gray.jpg", "palette.gif", "turned.jpg")
    assert flat.label.tolist() == [-1] * 4
    assert flat.about.classes == ()
    monkeypatch.chdir(folder)
    embed(encoder, [Path("dog/gray.jpg"), "dog/cmyk.jpg"], tmp_path / "two.parquet", NONE, device="cpu")
    two = read_features(tmp_path / "two.parquet")
    assert two.key == ("dog/cmyk.jpg", "dog/gray.jpg")
    np.testing.assert_allclose(two.embedding, flat.embedding[:2], rtol=1e-4, atol=1e-5)
    embed(encoder, "dog/gray.jpg", tmp_path / "one.parquet", NONE, device="cpu")
    assert read_features(tmp_path / "one.parquet").key == ("dog/gray.jpg",)


def test_the_digest_is_of_the_images(make_encoder: Make, folder: Path, tmp_path: Path) -> None:
    """Of names, labels and bytes, wherever the folder lies; and workers change nothing."""
    encoder, seen = make_encoder(), []

    def digest(source: Path, settings: EmbedSettings = NONE) -> str:
        embed(encoder, source, tmp_path / "f.parquet", settings, device="cpu")
        seen.append(read_features(tmp_path / "f.parquet").about.data_digest)
        return seen[-1]

    first = digest(folder)
    assert digest(folder.rename(tmp_path / "moved"), EmbedSettings(batch_size=2, workers=2)) == first
    moved = tmp_path / "moved"
    content = (moved / "dog" / "gray.jpg").read_bytes()
    (moved / "dog" / "gray.jpg").write_bytes(content + b"\0")
    assert digest(moved) != first
    (moved / "dog" / "gray.jpg").write_bytes(content)
    (moved / "dog" / "cmyk.jpg").rename(moved / "cat" / "cmyk.jpg")
    assert digest(moved) not in seen[:-1]


def embed_on_a_rank(here: World, encoder: Path, source: Path, out: Path, skip_bad: bool) -> tuple[int, int]:
    done = embed_within(here, encoder, find_images([source]), out, EmbedSettings(batch_size=2, workers=0, skip_bad=skip_bad))
    return done.images, done.left_out


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks(make_encoder: Make, folder: Path, tmp_path: Path, world_size: int) -> None:
    encoder, alone, shared = make_encoder(), tmp_path / "alone.parquet", tmp_path / "shared.parquet"
    (folder / "dog" / "bad.jpg").write_bytes(b"no image")
    embed(encoder, folder, alone, EmbedSettings(workers=0, skip_bad=True), device="cpu")
    assert ranks.run(embed_on_a_rank, world_size, encoder, folder, shared, True) == [(7, 1)] * world_size
    one, many = read_features(alone), read_features(shared)
    assert one.about == many.about
    assert one.key == many.key == KEYS
    assert np.array_equal(one.label, many.label)
    np.testing.assert_allclose(one.embedding, many.embedding, rtol=1e-4, atol=1e-5)


def test_bf16(make_encoder: Make, folder: Path, tmp_path: Path) -> None:
    encoder = make_encoder()
    for precision in ("fp32", "bf16"):
        settings = EmbedSettings(workers=0, precision=precision)
        embed(encoder, folder, tmp_path / f"{precision}.parquet", settings, device="cpu")
    fp32, bf16 = (read_features(tmp_path / f"{name}.parquet") for name in ("fp32", "bf16"))
    assert bf16.about.precision == "bf16"
    distance = np.linalg.norm(fp32.embedding - bf16.embedding) / np.linalg.norm(fp32.embedding)
    assert 1e-4 < distance < 2e-2


def test_tf32_is_refused_where_there_is_none(
    make_encoder: Make, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "features.parquet"
    arguments = [str(make_encoder()), str(folder), str(out), "--workers", "0", "--precision", "tf32", "--device", "cpu"]
    assert main(["embed", *arguments]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "simclr-dist: precision: tf32: cpu has no TF32; take fp32"
    assert not out.exists()


def test_a_bad_image_is_refused_or_left_out(make_encoder: Make, folder: Path, tmp_path: Path) -> None:
    encoder, out, good = make_encoder(), tmp_path / "f.parquet", tmp_path / "good.parquet"
    embed(encoder, folder, good, NONE, device="cpu")
    (folder / "cat" / "empty.png").write_bytes(b"")
    (folder / "dog" / "half.jpg").write_bytes((folder / "dog" / "gray.jpg").read_bytes()[:300])
    with pytest.raises(RankError, match=r"cat/empty\.png: an empty file; mend it, or .*--skip-bad") as caught:
        embed(encoder, folder, out, NONE, device="cpu")
    assert "\n" not in str(caught.value)
    assert not out.exists()
    done = embed(encoder, folder, out, EmbedSettings(workers=2, batch_size=2, skip_bad=True), device="cpu")
    assert (done.images, done.left_out) == (7, 2)
    assert done.reasons[0] == f"{folder / 'cat' / 'empty.png'}: an empty file"
    assert done.reasons[1].startswith(f"{folder / 'dog' / 'half.jpg'}: ")
    left, whole = read_features(out), read_features(good)
    assert left.key == whole.key == KEYS
    assert np.array_equal(left.label, whole.label)
    np.testing.assert_allclose(left.embedding, whole.embedding, rtol=1e-4, atol=1e-5)


def test_a_bad_image_in_shards(make_encoder: Make, make_shards: Make, tmp_path: Path) -> None:
    shards = make_shards("set", *draw_images(8, seed=0))
    content = bytearray((shards / "part-1.tar").read_bytes())
    content[int(load_manifest(shards).offset[5]) + 60] ^= 1
    (shards / "part-1.tar").write_bytes(content)
    with pytest.raises(RankError, match="image 000005"):
        embed(make_encoder(), shards, tmp_path / "f.parquet", NONE, device="cpu")
    done = embed(make_encoder(), shards, tmp_path / "f.parquet", EmbedSettings(workers=0, skip_bad=True), device="cpu")
    assert (done.images, done.left_out) == (7, 1)
    assert "000005" not in read_features(tmp_path / "f.parquet").key


def test_nothing_that_can_be_read(make_encoder: Make, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"none of the 1 images can be read, like .*a\.jpg: not an image"):
        embed(make_encoder(), tmp_path / "a.jpg", tmp_path / "f.parquet", EmbedSettings(workers=0, skip_bad=True), device="cpu")
    assert not (tmp_path / "f.parquet").exists()


def test_a_huge_image_is_not_decoded(make_encoder: Make, tmp_path: Path) -> None:
    content = io.BytesIO()
    Image.new("1", (20_000, 6_000)).save(content, "PNG")
    (tmp_path / "huge.png").write_bytes(content.getvalue())
    with pytest.raises(RankError, match=r"huge\.png: 20000 x 6000 is more than 100 megapixels"):
        embed(make_encoder(), tmp_path / "huge.png", tmp_path / "f.parquet", NONE, device="cpu")


def test_the_verb(make_encoder: Make, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "notes.txt").write_text("no image")
    (folder / "cat" / "bad.png").write_bytes(b"no image")
    (folder / "cat" / "away.png").symlink_to("nothing")
    out = tmp_path / "f.parquet"
    arguments = ["embed", str(make_encoder()), str(folder), str(out), "--device", "cpu", "--workers", "0", "--skip-bad"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "passed over: 1, like notes.txt (no image's file extension)"
    assert lines[1] == "left out: cat/away.png: a broken link (No such file or directory)"
    assert lines[2] == "links that are left out: 1 in all"
    assert lines[3] == f"left out: {folder / 'cat' / 'bad.png'}: not an image"
    assert lines[4] == "images that cannot be read and are left out: 1"
    assert lines[5].startswith("7 images, 128 numbers each, 0.0 MiB in ")
    assert lines[5].endswith(f"; written: {out}")
    assert lines[6:8] == ["", "Next:"]
    shown = subprocess.run(["sh", "-c", lines[8]], capture_output=True, text=True, check=True).stdout  # typed as it stands
    assert "embedding: " in shown
    assert main(arguments) == 0, "an older file is replaced"


def test_mistakes_are_one_line_before_torch(
    make_encoder: Make, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder, a, b = str(make_encoder()), str(folder / "dog" / "gray.jpg"), str(folder / "dog" / "cmyk.jpg")
    out, empty, other = str(tmp_path / "f.parquet"), tmp_path / "empty", tmp_path / "other.parquet"
    empty.mkdir()
    (tmp_path / "mixed" / "cat").mkdir(parents=True)
    for name in ("x.png", "cat/x.png"):
        (tmp_path / "mixed" / name).write_bytes(b"")
    other.write_bytes(b"the user's own")
    (tmp_path / "x.tar").write_bytes(b"")
    mistakes = {
        f"{tmp_path / 'none'}: no such file; name an encoder of a run": [str(tmp_path / "none"), a, out],
        f"{tmp_path}: a folder, not an encoder; name an encoder of a run": [str(tmp_path), a, out],
        f"{tmp_path}: is a folder; name the file of features": [encoder, a, str(tmp_path)],
        f"{b}: the file of features comes last": [encoder, a, b],
        f"{other}: is there, and is no file of features": [encoder, a, str(other)],
        f"{a}/f.parquet: its folder cannot be written to": [encoder, b, f"{a}/f.parquet"],
        "/proc/f.parquet: its folder cannot be written to": [encoder, a, "/proc/f.parquet"],
        f"{folder / 'f.parquet'}: is inside {folder}": [encoder, str(folder), str(folder / "f.parquet")],
        f"{empty}: no image found": [encoder, str(empty), out],
        f"{tmp_path / 'mixed'}: holds both images (x.png) and folders of images (cat)": [encoder, str(tmp_path / "mixed"), out],
        f"{tmp_path / 'no'}: no such file or folder": [encoder, str(tmp_path / "no"), out],
        f"{a}: is named twice": [encoder, a, a, out],
        f"{folder}: is a folder, and 1 more are named": [encoder, a, str(folder), out],
        f"{tmp_path / 'x.tar'}: is no image; name the folder of shards": [encoder, str(tmp_path / "x.tar"), out],
        "batch_size: 0 is too small; the least is 1": [encoder, a, out, "--batch-size", "0"],
        "workers: -1 is too small; the least is 0": [encoder, a, out, "--workers", "-1"],
    }
    for says, arguments in mistakes.items():
        assert main(["embed", *arguments]) == 2
        line = capsys.readouterr().err
        assert line.startswith(f"simclr-dist: {says}")
        assert line.count("\n") == 1
    assert other.read_bytes() == b"the user's own"
    assert not Path(out).exists()
    code = f"import sys\nfrom simclr_dist.cli.main import main\ncode = main({['embed', encoder, str(empty), out]})\n"
    code += "assert code == 2 and 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL, check=False).returncode == 0


def test_mistakes_inside_files(make_encoder: Make, make_shards: Make, folder: Path, tmp_path: Path) -> None:
    out, bad = tmp_path / "f.parquet", tmp_path / "bad.safetensors"
    bad.write_bytes(b"no encoder")
    with pytest.raises(DataError, match=r"bad\.safetensors: not an encoder"):
        embed(bad, folder, out, NONE, device="cpu")
    with pytest.raises(ConfigError, match="layer: 'x' is not"):
        embed(make_encoder(), folder, out, EmbedSettings(layer="x"), device="cpu")
    (tmp_path / "both").mkdir()
    make_shards("train", *draw_images(4, seed=0)).rename(tmp_path / "both" / "train")
    with pytest.raises(DataError, match=r"has no manifest.parquet; name one of .*both/train"):
        embed(make_encoder(), tmp_path / "both", out, NONE, device="cpu")
    with pytest.raises(ConfigError, match="precision: 'fp16'"):
        EmbedSettings(precision="fp16")
    assert not out.exists()


def test_images_inside_parquet(make_encoder: Make, folder: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "rows").mkdir()
    pq.write_table(pa.table({"image": [(folder / "dog" / "gray.jpg").read_bytes()]}), tmp_path / "rows" / "a.parquet")
    with pytest.raises(DataError, match="holds images inside tables or archives"):
        embed(make_encoder(), tmp_path / "rows", tmp_path / "f.parquet", NONE, device="cpu")
    with pytest.raises(DataError, match=r"a\.parquet: is no image"):
        embed(make_encoder(), tmp_path / "rows" / "a.parquet", tmp_path / "f.parquet", NONE, device="cpu")


def test_two_files_of_one_printable_name(tmp_path: Path) -> None:
    """They are refused before any is read, be they in a folder or named one by one."""
    (tmp_path / "flat").mkdir()
    for name in ("a\n.png", "a\\n.png"):
        Image.new("RGB", (9, 9)).save(tmp_path / "flat" / name)
    for sources, shown in (([tmp_path / "flat"], ""), (sorted((tmp_path / "flat").iterdir()), f"{tmp_path}/flat/")):
        with pytest.raises(DataError) as caught:
            find_images(sources)
        assert str(caught.value).startswith(f"{shown}a\\n.png: is named twice; name each image once, and rename one")


@pytest.mark.slow
def test_a_stop_signal_leaves_nothing(make_encoder: Make, make_shards: Make, tmp_path: Path) -> None:
    shards, out = make_shards("set", *draw_images(600, seed=0)), tmp_path / "f.parquet"
    arguments = [str(make_encoder()), str(shards), str(out), "--device", "cpu", "--batch-size", "1", "--workers", "1"]
    with Command(main, ["embed", *arguments]) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not children.read_text():
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGTERM)
        _, error = process.communicate(timeout=60)
        assert error == "simclr-dist: stopped by SIGTERM, nothing is written; the same command starts again\n"
        assert process.returncode == 75
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "set"]


@pytest.mark.slow
def test_under_torchrun(make_encoder: Make, folder: Path, tmp_path: Path) -> None:
    out, torchrun = (
        tmp_path / "f.parquet",
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    )
    command = [*torchrun, "-m", "simclr_dist", "embed", str(make_encoder()), str(folder), str(out), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written: ") == 1
    assert read_features(out).key == KEYS


def test_one_rank_speaks_for_all(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    for rank, says in (("1", ""), ("0", "simclr-dist: workers: -1 is too small; the least is 0\n")):
        monkeypatch.setenv("RANK", rank)
        assert main(["embed", "e.safetensors", "a.jpg", "f.parquet", "--workers", "-1"]) == 2
        assert capsys.readouterr().err == says
