"""Other verbs on a real SLURM: a conversion in parts, of which one is killed, and features by ranks of two nodes."""

import io
import json
import os
import signal
from pathlib import Path

from PIL import Image

from simclr_dist.convert.shards import write_shards
from simclr_dist.encoder.file import export_encoder, untrained_encoder
from simclr_dist.evaluate.features.file import read_features
from simclr_dist.run.status import read_ledger
from slurm.cluster import Cluster
from slurm.training import STARTUP, Run

CARD = {
    "encoder": "resnet10", "width": 1, "stem": "small_stride2", "feature_size": 128, "image_size": 16, "channels": 3,
    "mean": [0.5] * 3, "std": [0.25] * 3, "step": 7, "init": "random", "data_digest": "0" * 64, "config": {"seed": 0},
}  # fmt: skip
PHOTOS, A_UNIT = 1024, 128


def make_photos(folder: Path) -> None:
    """Photos that take a while to decode, of different bytes: a comment in each has its number."""
    content = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").resize((1600, 1200)).save(content, "JPEG")
    for number in range(PHOTOS):
        path = folder / f"class{number % 2}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.getvalue()[:2] + b"\xff\xfe\0\x06%04d" % number + content.getvalue()[2:])


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_killed_part_is_made_again_alone(cluster: Cluster, tmp_path: Path) -> None:
    make_photos(tmp_path / "photos")
    (tmp_path / "profile.yaml").write_text("gpus_per_node: 0\ncpus_per_task: 1\n")
    (tmp_path / "ranks.yaml").write_text("{gpus_per_node: 0, nodes: 2, environment: {GLOO_SOCKET_IFNAME: eth0}}")
    cluster.environment |= STARTUP
    command, out = Run.command, tmp_path / "out"
    here = Run.__new__(Run)
    here.cluster, here.folder = cluster, tmp_path
    words = ("submit", "shard", "photos", "out", "--parts", "2", "--profile", "profile.yaml", "--shard-size", "100")
    try:
        command(here, *words)
        record = json.loads((tmp_path / "out.jobs" / "submission.json").read_text())
        parts, last = [f"{record['job_id']}_{part}" for part in (1, 2)], record["eval_job_id"]
        first = tmp_path / "out.partial" / "units" / "000000.arrow"
        cluster.until(first.exists, "part 1 has made a unit", 60)
        made = first.stat().st_mtime_ns
        [killed] = [
            pid
            for node in cluster.nodes
            for pid in cluster.network.pids(node, "-m simclr_dist shard photos out --shard-size 100 --part 1/2")
        ]
        os.kill(killed, signal.SIGKILL)
        cluster.until(lambda: cluster.show(parts[0]).get("Restarts") == "1", "part 1 is requeued", 60)
        assert cluster.state(last) == "PENDING"
        assert "its job" in command(here, *words, check=False), "what is at work is not sent again"
        said = command(here, "submit", "status", "out")
        assert f"part 1      {parts[0]}: " in said
        assert "1 x: a task of the work job ended with -9" in said
        cluster.until(lambda: cluster.state(parts[0]) == "COMPLETED", "part 1 is done", 120)
        assert first.stat().st_mtime_ns == made, "what was done is not done again"
        assert cluster.wait(last, "COMPLETED", "FAILED", "CANCELLED", seconds=120) == "COMPLETED"
        assert [cluster.show(part)["Restarts"] for part in parts] == ["1", "0"]
        assert [entry["job"] for entry in read_ledger(tmp_path / "out.jobs") if entry["event"] == "requeued"] == parts[:1]
        write_shards(tmp_path / "photos", tmp_path / "straight", shard_size=100, processes=1)
        assert bytes_of(out) == bytes_of(tmp_path / "straight")
        assert not (tmp_path / "out.partial").exists()
        assert f"written to {out}" in command(here, "submit", "logs", "out")
        export_encoder(tmp_path / "encoder.safetensors", untrained_encoder(CARD, 0), CARD)
        (tmp_path / "bad.safetensors").touch()
        command(here, "submit", "embed", "bad.safetensors", "out", "bad.parquet", "--profile", "ranks.yaml")
        job = json.loads((tmp_path / "bad.parquet.jobs" / "submission.json").read_text())["job_id"]
        assert cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", seconds=120) == "FAILED"
        assert cluster.show(job)["Restarts"] == "0", "the other rank, which the first one's end stops, does not ask for more"
        command(here, "submit", "embed", "encoder.safetensors", "out", "f.parquet", "--profile", "ranks.yaml", "--workers", "0")
        job = json.loads((tmp_path / "f.parquet.jobs" / "submission.json").read_text())["job_id"]
        assert cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", seconds=120) == "COMPLETED"
        assert len(read_features(tmp_path / "f.parquet").key) == PHOTOS
    except AssertionError as error:
        logs = "".join(f"--- {path}\n{path.read_text()[-2000:]}" for path in sorted(tmp_path.glob("*.jobs/slurm/*_log.*")))
        raise AssertionError(f"{error}\n{logs}") from error
    finally:
        cluster.cancel_all()
