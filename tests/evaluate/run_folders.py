"""Run folders as starts and evaluations leave them, without either."""

import json
from pathlib import Path
from typing import Any

from simclr_dist.config.load import config_from_dict
from simclr_dist.evaluate.result.file import FORMAT, TRAINED
from simclr_dist.run.folder import open_run
from simclr_dist.run.status import End, record_end, record_start

BASE: dict[str, Any] = {"global_batch_size": 8, "steps": 40, "data": {"shards": "shards"}}


def begun(run: Path, steps: int = 40, state: str = "done", length: dict[str, Any] | None = None, **settings: Any) -> Path:
    """A run folder after a start of 2 ranks that took 1800 s."""
    claim = open_run(config_from_dict({**BASE, **settings, **(length or {}), "run_folder": str(run)}, "test"), {})
    record_start(claim, 0, 2, 40)
    (run / "checkpoints" / f"step-{steps:08d}.json").touch()
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(10, steps + 1, 10):
            timing = {"speed/images_per_second": 100.0 + step, "speed/step_ms": 500.0, "speed/seconds_left": 0.5 * (40 - step)}
            file.write(json.dumps({"step": step, "loss/nt_xent": 5.0 - step / 10, "timing": timing}) + "\n")
    claim.beat(steps)
    codes = {"done": 0, "preempted": 75, "failed": 2, "diverged": 3, "crashed": 1}
    record_end(run, claim.generation, End(state, codes[state], None if state == "done" else "because"), seconds=1800.0)
    claim.release()
    return run


def evaluated(run: Path, step: int, test: str = "t", **top1: float) -> None:
    images = {"folder": f"{test}/images", "digest": test, "labelled": 64}
    settings = {"knn": {"k": 20, "k_used": 20}, "linear": {"l2": "chosen"}}
    result = {
        "format": FORMAT, "classes": 10, "seconds": {}, "settings": {"layer": "h", "precision": "fp32", "seed": 0},
        "encoder": {"file": "e", "sha256": f"{step}", "step": step}
        | dict.fromkeys(("name", "width", "stem", "layer", "feature_size", "image_size", "mean", "std")),
        "train": {**images, "folder": "train"}, "test": images,
        "protocols": {name: {"settings": settings[name], "results": {TRAINED: {"top1": top1[name]}}} for name in top1},
    }  # fmt: skip
    (run / "eval").mkdir(exist_ok=True)
    (run / "eval" / f"step-{step:08d}.json").write_text(json.dumps(result))
