"""What `data.shards` may name: folders, URLs, tars in brace notation; and the one line for what is none of these."""

from pathlib import Path

import numpy as np
import pytest

from simclr_dist.data.collection import expand, load_collection
from simclr_dist.data.manifest import Manifest, load_manifest
from simclr_dist.data.reader import ShardDataset
from simclr_dist.data.remote.cache import CacheSettings
from simclr_dist.system.errors import DataError
from small_shards import serve, write_small_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_shards(tmp_path_factory.mktemp("shards"), [3, 4, 5, 2])


def assert_same(a: Manifest, b: Manifest) -> None:
    assert (a.digest, a.shards, a.classes) == (b.digest, b.shards, b.classes)
    for name in ("shard_sizes", "shard_bytes", "key", "shard", "offset", "size", "label", "width", "height", "sha256"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name


def test_braces_that_name_all_are_the_folder(shards: Path) -> None:
    assert_same(load_collection(f"{shards}/train-{{000000..000003}}.tar"), load_manifest(shards))
    assert_same(load_collection("train-{000000..000003}.tar", beside=shards), load_manifest(shards))
    assert_same(load_collection(shards.name, beside=shards.parent), load_manifest(shards))


def test_braces_that_name_some_are_these_in_the_manifests_order(shards: Path, tmp_path: Path) -> None:
    whole, part = load_manifest(shards), load_collection(f"{shards}/train-00000{{3,1}}.tar")
    assert part.shards == ("train-000001.tar", "train-000003.tar")
    assert part.shard_sizes.tolist() == [4, 2]
    assert part.key.tolist() == [*whole.key[3:7], *whole.key[12:14]]
    assert part.shard.tolist() == [0, 0, 0, 0, 1, 1]
    assert part.digest != whole.digest
    images = ShardDataset(f"{shards}/train-00000{{3,1}}.tar")
    assert [images[row].label for row in range(len(images))] == [0, 1, 2, 0, 0, 1]
    # As if only these had been sharded; and the others need not be there.
    for path in shards.iterdir():
        if path.name not in ("train-000000.tar", "train-000002.tar"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert_same(load_collection(f"{tmp_path}/train-00000{{1..3..2}}.tar"), part)
    assert len(load_collection(f"{tmp_path}/train-000003.tar")) == 2
    with pytest.raises(DataError, match=r"train-000000.tar: in manifest.parquet, but No such file"):
        load_collection(tmp_path)


def test_a_folder_with_braces_in_its_name(tmp_path: Path) -> None:
    folder = write_small_shards(tmp_path / "a{1,2}", [2])
    assert len(load_collection(folder)) == 2


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("train-{000002..000005}.tar", r"manifest.parquet: does not list 'train-000004.tar'; name tars that it lists"),
        ("{a,b}/x.tar", r"its tars lie in 2 folders"),
        ("train-{0..3.tar", r"Unbalanced braces"),
        ("train-{0..10000000000}.tar", r"more than 1000000 shards"),
        ("train-{0..1" + 40 * "0" + "}.tar", r"more than 1000000 shards"),
        ("train-" + 3000 * "{" + 3000 * "}" + ".tar", r"is longer than 4096 characters"),
        ("train-{000001," + 30 * "0123456789," + "x}.tar", r"does not list 'train-0123456789.tar'|names \S+ twice"),
        ("train-{0..2000}{0..2000}.tar", r"more than 1000000 shards"),
        ("{train,train}-000001.tar", r"names \S+train-000001.tar twice"),
        ("pipe:cat x.tar", r"a shell command has no manifest; it can only be read with data.reader: stream"),
        ("nowhere", r"nowhere: no such folder of shards"),
        ("nowhere/x-{0..3}.tar", r"nowhere: no such folder of shards"),
        ("manifest.parquet", r"manifest.parquet: no such folder of shards; name its folder, \S+$"),
    ],
)
def test_what_cannot_be_read_is_one_line(shards: Path, where: str, line: str) -> None:
    with pytest.raises(DataError, match=rf"^[^\n]*{line}[^\n]*$"):
        load_collection(where if where.startswith("pipe") else f"{shards}/{where}")


def test_without_a_manifest_the_line_says_how_to_get_one(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "train-000000.tar").write_bytes((shards / "train-000000.tar").read_bytes())
    for where in (tmp_path, tmp_path / "train-{000000..000000}.tar"):
        with pytest.raises(DataError, match=r"has no manifest.parquet; [^\n]*`simclr-dist shard --index [^\n]*$"):
            load_collection(where)
    with serve(tmp_path) as server:
        for url in (server.url, f"{server.url}/train-{{000000..000003}}.tar"):
            with pytest.raises(DataError, match=r"manifest.parquet: [^\n]* 404 [^\n]*shard --index[^\n]*reader: stream$"):
                load_collection(url)


def test_a_url_is_the_folder(shards: Path, tmp_path: Path) -> None:
    whole = load_manifest(shards)
    with serve(shards) as server:
        for url in (server.url, f"{server.url}/", f"{server.url}/train-{{000000..000003}}.tar"):
            manifest = load_collection(url, beside="/nowhere")
            assert_same(manifest, whole)
            assert manifest.folder == server.url
        part = load_collection(f"{server.url}/train-00000{{1,3}}.tar")
        images = ShardDataset(f"{server.url}/train-00000{{1,3}}.tar", cache=CacheSettings(tmp_path, 1 << 30))
        assert images.digest == part.digest
        assert [images.read(row) for row in range(6)] == [ShardDataset(shards).read(row) for row in (3, 4, 5, 6, 12, 13)]
        assert server.asked["train-000000.tar"] == 0
        assert server.asked["train-000001.tar"] == 1


def test_expand() -> None:
    assert expand("a/x-{08..11..2}.tar") == ["a/x-08.tar", "a/x-10.tar"]
    assert expand("s3://b/{u,v}-{0..1}.tar") == [f"s3://b/{name}.tar" for name in ("u-0", "u-1", "v-0", "v-1")]
    assert expand("plain.tar") == ["plain.tar"]
