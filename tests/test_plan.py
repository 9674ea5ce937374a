"""`simclr-dist plan`: derived numbers, without GPU, shards or memory."""

import resource
from pathlib import Path

import pytest

from simclr_dist.config import CheckpointConfig, Config, DataConfig, ModelConfig, OptimConfig
from simclr_dist.errors import ConfigError, DataError
from simclr_dist.plan import plan

IMAGENET = 1_281_167


def table(config: Config, **more: int) -> dict[str, str]:
    return {line[:28].strip(): line[28:] for line in plan(config, **more).splitlines()}


def paper(**changes: object) -> Config:
    """ResNet-50 with 4096 images a step."""
    return Config(**{"run_folder": "r", "epochs": 100.0, "data": DataConfig(shards="none"), **changes})  # type: ignore[arg-type]


def test_the_papers_run() -> None:
    rows = table(paper(), world_size=8, samples=IMAGENET)
    assert rows["images"].startswith("1281167; 312 steps an epoch, 3215 left over")
    assert rows["global batch"] == "4096 = 1 micro-batches x 8 ranks x 512"
    assert rows["negatives an anchor"] == "8190"
    assert rows["BatchNorm group"].startswith("4096 images")
    assert rows["steps"].strip() == "31200 = 100.0 epochs, the first 3120 warm-up"
    assert rows["peak learning rate"].startswith("4.8 (0.3 by the linear rule)")
    # torchvision's resnet50 has 25,557,032 parameters, 2,049,000 of them in the classifier; the projector is
    # 2048 x 2048 + 2048 x 128 weights and 2 x (2048 + 128) of BatchNorm.
    encoder, projector = 25_557_032 - 2_049_000, 2048 * 2048 + 2048 * 128 + 2 * (2048 + 128)
    assert rows["parameters"] == "27.97 M (encoder 23.51 M, projector 4.46 M)"
    one = (encoder + projector) * 4 / 2**20
    assert rows["memory a rank: weights"] == f"{one:.1f} MiB"
    assert rows["memory a rank: gradients"] == f"{2 * one:.1f} MiB (DDP's buckets included)"
    assert rows["memory a rank: optimizer"] == f"{one:.1f} MiB"
    assert rows["memory a rank: activations"].endswith("those of 1024 views at a time")
    assert "whole 8192 x 8192 matrix would be 256.0 MiB" in rows["memory a rank: loss"]


def test_micro_batches_and_processes() -> None:
    rows = table(paper(micro_batches=16), world_size=1, samples=IMAGENET)
    assert rows["global batch"] == "4096 = 16 micro-batches x 1 ranks x 256"
    assert rows["negatives an anchor"] == "8190", "whatever the pieces"
    assert rows["BatchNorm group"].startswith("256 images")
    assert rows["memory a rank: gradients"] == rows["memory a rank: weights"]
    assert rows["memory a rank: activations"].endswith("those of 512 views at a time")


@pytest.mark.parametrize(("name", "times"), [("lars", 1), ("sgd", 1), ("adamw", 2), ("torch_optimizer.yogi", None)])
def test_optimizer_memory(name: str, times: int | None) -> None:
    rows = table(paper(optim=OptimConfig(name=name)), samples=IMAGENET)
    weights = float(rows["memory a rank: weights"].removesuffix(" MiB"))
    if times is None:
        assert rows["memory a rank: optimizer"] == f"not known for {name}"
    else:
        assert float(rows["memory a rank: optimizer"].removesuffix(" MiB")) == pytest.approx(times * weights, rel=1e-3)


def test_the_square_root_rule_and_float64() -> None:
    config = paper(optim=OptimConfig(base_lr=0.075, lr_rule="sqrt"), precision="fp64")
    rows = table(config, samples=IMAGENET)
    assert rows["peak learning rate"].startswith("4.8 (0.075 by the sqrt rule)")
    assert float(rows["memory a rank: weights"].removesuffix(" MiB")) == pytest.approx(213.4, abs=0.1)


def test_nothing_is_allocated() -> None:
    """A ResNet-152 of width 4 is 3.5 GiB of weights."""
    table(paper(), samples=IMAGENET)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = table(paper(model=ModelConfig(encoder="resnet152", width=4)), samples=IMAGENET)
    assert rows["memory a rank: weights"].endswith("GiB")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def test_a_config_that_cannot_run_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.shards: 'none' is not here; give the number of images by --samples N"):
        plan(paper())
    with pytest.raises(ConfigError, match="4096 is larger than the 1000 images"):
        plan(paper(), samples=1000)
    with pytest.raises(ConfigError, match="not divided by 3 processes"):
        plan(paper(), samples=IMAGENET, world_size=3)
    with pytest.raises(ConfigError, match="not one step"):
        plan(paper(epochs=0.001), samples=IMAGENET)


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no manifest\.parquet"):
        plan(paper(data=DataConfig(shards=str(tmp_path)), checkpoint=CheckpointConfig()))
