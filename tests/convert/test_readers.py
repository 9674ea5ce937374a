"""Readers of others take the shards as they are: each reads every image once, with its label. (webdataset: test_shards.py.)"""

import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from pictures import encoded, stored
from simclr_dist.convert.shards import write_shards

COUNT = 23
READERS = {
    "timm": """
from timm.data import create_dataset
for split in ("train", "test"):
    data = create_dataset("wds/any", root=sys.argv[1], split=split, batch_size=4)
    side = create_dataset("wds/any", root=sys.argv[1] + "/" + split, split=split, batch_size=4)
    found = [(label, png(image)) for image, label in data]
    assert len(data) == len(side) == len(found), (len(data), len(side))
    say(split, found)
""",
    "wids": """
import wids
for split in ("train", "test"):
    data = wids.ShardListDataset(sys.argv[1] + "/" + split + "/_info.json")
    say(split, [(data[i][".cls"], png(data[i][".png"])) for i in range(len(data))])
""",
    "datasets": """
import datasets
files = {split: f"{sys.argv[1]}/{split}/*.tar" for split in ("train", "test")}
for split in files:
    data = datasets.load_dataset("webdataset", data_files=files, split=split)
    stream = datasets.load_dataset("webdataset", data_files=files, split=split, streaming=True)
    found = [(row["cls"], png(row["png"])) for row in data]
    assert found == [(row["cls"], png(row["png"])) for row in stream]
    say(split, found)
""",
    "ray": """
import tempfile
import ray
from PIL import Image
with tempfile.TemporaryDirectory(dir="/tmp") as short:  # sockets have short names
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20, _temp_dir=short)
    for split in ("train", "test"):
        rows = ray.data.read_webdataset(sys.argv[1] + "/" + split, file_extensions=["tar"]).take_all()
        say(split, [(row["cls"], png(Image.fromarray(row["png"]))) for row in rows])
    ray.shutdown()
""",
}
START = """
import hashlib, json, sys
def png(image):
    return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()
def say(split, found):
    print(json.dumps([split, sorted(found)]))
"""


def shards(folder: Path) -> Path:
    for i in range(COUNT):
        path = folder / "src" / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(i))
    write_shards(folder / "src", folder / "out", processes=1, shard_size=5, split=(0.8, 0.2))
    return folder / "out"


@pytest.mark.parametrize("name", READERS)
def test_each_reader_finds_every_image(tmp_path: Path, name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs pip install {name}")
    out = shards(tmp_path)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # it hides packages
    environment |= {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(tmp_path),
        "WIDS_CACHE": str(tmp_path / "wids"),
        "RAY_AUTH_MODE": "disabled",
    }
    command = [sys.executable, "-c", START + READERS[name], str(out)]
    left_by_wids = Path("/tmp/_wids_cache")  # made by `import wids`, whatever TMPDIR says
    was_there = left_by_wids.exists()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if left_by_wids.exists() and not was_there:
        left_by_wids.rmdir()
    assert done.returncode == 0, done.stderr[-3000:]
    found = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert set(found) == {"train", "test"}
    for split, images in found.items():
        expected = Counter()
        for label, content in stored(out / split).values():
            pixels = Image.open(io.BytesIO(content)).convert("RGB").tobytes()
            expected[label, hashlib.sha256(pixels).hexdigest()] += 1
        assert Counter(map(tuple, images)) == expected
    assert sum(map(len, found.values())) == COUNT


def test_the_index_for_others_has_every_tar(tmp_path: Path) -> None:
    out = shards(tmp_path)
    both = json.loads((out / "_info.json").read_text())["splits"]
    for split in ("train", "test"):
        side = json.loads((out / split / "_info.json").read_text())
        names = sorted(path.name for path in (out / split).glob("*.tar"))
        lengths = side["splits"][split]["shard_lengths"]
        assert side["splits"][split]["filenames"] == names
        assert side["shardlist"] == [{"url": name, "nsamples": n} for name, n in zip(names, lengths, strict=True)]
        assert both[split]["filenames"] == [f"{split}/{name}" for name in names]
        assert sum(lengths) == both[split]["num_samples"] == len(stored(out / split))
    write_shards(tmp_path / "src", tmp_path / "one", processes=1)
    assert json.loads((tmp_path / "one" / "_info.json").read_text())["splits"]["train"]["shard_lengths"] == [COUNT]


def test_shards_made_before_there_was_such_an_index_are_done(tmp_path: Path) -> None:
    out = shards(tmp_path)
    for path in out.rglob("_info.json"):
        path.unlink()
    summary = write_shards(tmp_path / "src", out, processes=1, shard_size=5, split=(0.8, 0.2))
    assert summary.already
    assert not [*out.rglob("_info.json")]
