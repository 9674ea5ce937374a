"""`simclr-dist plan`: derived numbers, without GPU, shards or memory."""

import dataclasses
import json
import re
import resource
from pathlib import Path

import pytest

from simclr_dist.config.settings import CheckpointConfig, Config, DataConfig, ModelConfig, OptimConfig
from simclr_dist.preflight.plan.hardware import Machines, bandwidth, gpu, seconds
from simclr_dist.preflight.plan.memory import rank_memory
from simclr_dist.preflight.plan.report import Plan, make_plan, text
from simclr_dist.preflight.plan.scaling import NoStep, Step
from simclr_dist.preflight.plan.trace import footprint
from simclr_dist.system.errors import ConfigError, DataError

IMAGENET = 1_281_167


def refusal_of_gpu(name: str) -> str:
    with pytest.raises(ConfigError) as refused:
        gpu(name)
    return str(refused.value)


def table(config: Config, **more: int) -> dict[str, str]:
    lines = text(make_plan(config, **more)).partition("\n\n")[0].splitlines()
    return {line[:28].strip(): line[28:] for line in lines}


def paper(**changes: object) -> Config:
    """ResNet-50 with 4096 images a step."""
    return Config(**{"run_folder": "r", "epochs": 100.0, "data": DataConfig(shards="none"), **changes})  # type: ignore[arg-type]


def test_the_papers_run() -> None:
    rows = table(paper(), world_size=8, samples=IMAGENET)
    assert rows["images"].startswith("1281167; 312 steps an epoch, 3215 left over")
    assert rows["global batch"] == "4096 = 1 micro-batch x 8 ranks x 512"
    assert rows["negatives an anchor"] == "8190"
    assert rows["BatchNorm group"].startswith("4096 images")
    assert rows["steps"].strip() == "31200 = 100.0 epochs, the first 3120 warm-up"
    assert rows["peak learning rate"].startswith("4.8 (0.3 by the linear rule)")
    # torchvision's resnet50 has 25,557,032 parameters, 2,049,000 of them in the classifier; the projector is
    # 2048 x 2048 + 2048 x 128 weights and 2 x (2048 + 128) of BatchNorm.
    encoder, projector = 25_557_032 - 2_049_000, 2048 * 2048 + 2048 * 128 + 2 * (2048 + 128)
    assert rows["parameters"] == "27.97 M (encoder 23.51 M, projector 4.46 M)"
    one = (encoder + projector) * 4 / 2**20
    assert float(rows["memory a rank: weights"].removesuffix(" MiB")) == pytest.approx(
        one, rel=0.003
    )  # and BatchNorm's buffers
    assert rows["memory a rank: gradients"] == f"{2 * one:.1f} MiB (DDP's buckets included)"
    assert rows["memory a rank: optimizer"] == f"{one:.1f} MiB"
    assert rows["memory a rank: activations"].endswith("kept for the backward of 1024 views at a time")
    assert rows["memory a rank: peak"].endswith(", in: backward")
    assert "whole 8192 x 8192 matrix would be 256.0 MiB" in rows["memory a rank: loss"]


def test_workers_share_steps_and_do_not_multiply_them() -> None:
    """A step of 4096 images has 75 portions of 55: in hand, being gathered, and 10 ahead of each of 8 workers."""
    rows = table(paper(data=DataConfig(shards="none", workers=8)), world_size=1, samples=IMAGENET)
    portion = 2 * 55 * 3 * 224**2 / 2**30
    made, waiting = float(rows["ordinary memory a rank"].split()[0]), float(rows["shared memory a rank"].split()[0])
    assert made == pytest.approx((2 * 75 + 8 * 10) * portion, abs=0.01)
    assert waiting == pytest.approx((1 + 8 * 10) * portion, abs=0.01)
    assert rows["shared memory a rank"].endswith(" GiB of it at most in /dev/shm, by 8 workers")


def test_micro_batches_and_processes() -> None:
    rows = table(paper(micro_batches=16), world_size=1, samples=IMAGENET)
    assert rows["global batch"] == "4096 = 16 micro-batches x 1 rank x 256"
    assert rows["negatives an anchor"] == "8190", "whatever the pieces"
    assert rows["BatchNorm group"].startswith("256 images")
    assert rows["memory a rank: gradients"].endswith(" MiB")
    assert rows["memory a rank: activations"].endswith("kept for the backward of 512 views at a time")


@pytest.mark.parametrize(
    ("name", "times"), [("lars", 1), ("muon", 1), ("sgd", 1), ("adamw", 2), ("torch_optimizer.yogi", None)]
)
def test_optimizer_memory(name: str, times: int | None) -> None:
    rows = table(paper(optim=OptimConfig(name=name)), samples=IMAGENET)
    weights = float(rows["memory a rank: weights"].removesuffix(" MiB"))
    if times is None:
        assert rows["memory a rank: optimizer"] == f"not known for {name}"
    else:
        assert float(rows["memory a rank: optimizer"].removesuffix(" MiB")) == pytest.approx(times * weights, rel=3e-3)


def test_the_square_root_rule_and_float64() -> None:
    config = paper(optim=OptimConfig(base_lr=0.075, lr_rule="sqrt"), precision="fp64")
    rows = table(config, samples=IMAGENET)
    assert rows["peak learning rate"].startswith("4.8 (0.075 by the sqrt rule)")
    assert float(rows["memory a rank: weights"].removesuffix(" MiB")) == pytest.approx(213.8, abs=0.1)


def test_nothing_is_allocated() -> None:
    """A ResNet-152 of width 4 is 3.5 GiB of weights."""
    table(paper(), samples=IMAGENET)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = table(paper(model=ModelConfig(encoder="resnet152", width=4)), samples=IMAGENET)
    assert rows["memory a rank: weights"].endswith("GiB")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def test_a_config_that_cannot_run_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.shards: 'none' is not here; give the number of images by --samples N"):
        make_plan(paper())
    with pytest.raises(ConfigError, match="4096 is larger than the 1000 images"):
        make_plan(paper(), samples=1000)
    with pytest.raises(ConfigError, match="not divided by 3 processes"):
        make_plan(paper(), samples=IMAGENET, world_size=3)
    with pytest.raises(ConfigError, match="not one step"):
        make_plan(paper(epochs=0.001), samples=IMAGENET)


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no manifest\.parquet"):
        make_plan(paper(data=DataConfig(shards=str(tmp_path)), checkpoint=CheckpointConfig()))


H100 = Machines(gpu=gpu("h100"), bandwidth=bandwidth("25Gbit"))


def test_a_whole_cluster_without_memory() -> None:
    """ResNet-50 x4 at batch 8192, on 64 and on 1 to 512 GPUs: the model alone is 1.5 GiB, its activations 42."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = paper(global_batch_size=8192, precision="bf16", model=ModelConfig(width=4))
    values = make_plan(config, world_size=64, samples=IMAGENET, machines=H100).values()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024
    assert [scale["ranks"] for scale in values["scales"]] == [1, 8, 64, 512]
    pieces = [scale["micro_batches"] for scale in values["scales"]]
    assert pieces == sorted(pieces, reverse=True), "more GPUs never need more pieces"
    assert all(scale["memory"] <= H100.gpu.usable for scale in values["scales"] if H100.gpu)
    shares = [scale["of_linear"] for scale in values["scales"]]
    assert shares[0] == 1
    assert shares == sorted(shares, reverse=True)
    assert values["verdict"].startswith("stops after 64: 512 reach ")
    assert "gradients (its bytes)" in values["verdict"]
    assert values["seconds_a_step"] == values["compute_seconds"] + values["exchange_seconds"]
    json.dumps(values)


def test_flops_are_those_of_the_literature() -> None:
    """4.1 G multiplications and additions an image of 224 pixels (He et al. 2016); three passes, the first layer two."""
    found = footprint(paper(), 224)
    assert found.without_graph.flops(1) == pytest.approx(2 * 4.1e9, rel=0.02)
    assert found.first.flops(1) == pytest.approx(3 * found.without_graph.flops(1), rel=0.02)


def test_what_a_gpu_holds_decides_the_pieces() -> None:
    """One piece less would not fit; checkpointing and 16 bit need fewer."""
    fewest = []
    for changes in ({}, {"precision": "bf16"}, {"activation_checkpointing": True}):
        made = make_plan(paper(global_batch_size=1024, **changes), samples=IMAGENET, machines=Machines(gpu=gpu("a100-40")))
        fitting = made.fitting
        assert isinstance(fitting, Step)
        smaller = dataclasses.replace(made.config, micro_batches=fitting.micro_batches // 2)
        memory = rank_memory(smaller, made.footprint, 1, on_cuda=True)
        assert made.machines.gpu is not None
        assert fitting.memory.peak <= made.machines.gpu.usable < memory.peak
        fewest.append(fitting.micro_batches)
    assert fewest[0] > fewest[1]
    assert fewest[0] > fewest[2]
    too_small = make_plan(paper(global_batch_size=512), samples=IMAGENET, machines=Machines(gpu=gpu("1.6GiB")))
    assert too_small.fitting == NoStep(1, "does not fit 1.6GiB in any number of pieces")
    assert "\nranks\n    1  does not fit 1.6GiB in any number of pieces\n" in text(too_small)


def test_a_measured_speed_takes_the_place_of_a_share() -> None:
    made = make_plan(paper(), world_size=8, samples=IMAGENET, machines=Machines(images_per_second=400.0))
    assert made.step.compute == pytest.approx(4096 / 8 / 400, rel=0.01)
    assert "as measured: 400 images/s" in text(made)
    assert "--bandwidth" in made.values()["verdict"]


def test_precision_that_a_gpu_does_not_have() -> None:
    made = make_plan(paper(precision="bf16"), samples=IMAGENET, machines=Machines(gpu=gpu("v100-16")))
    assert made.step.compute is None
    assert "v100-16 has no bf16; take fp16" in text(made)


def other_ranks(made: Plan) -> list[list[str]]:
    """The words of each line of the last table, its header first; without the lines above and below."""
    return [line.split() for line in text(made).partition("\n\n")[2].splitlines()[1:-1]]


def test_on_a_cpu_the_table_has_the_numbers_of_ranks_of_one_machine_and_no_empty_column() -> None:
    config = paper(device="cpu", global_batch_size=64, data=DataConfig(shards="none", workers=1))
    made = make_plan(config, samples=1000)
    header, *lines = other_ranks(made)
    assert header == ["ranks", "pieces", "images", "group", "memory", "sent", "a", "step"]
    assert [line[0] for line in lines] == ["1", "2", "4", "8"]
    assert "?" not in text(made)
    assert "; in the log Python and torch are in it, too\n" in text(made), "there the peak is the process's"
    assert text(made).endswith(
        "\nspeed and network are not known: --images-per-second and --bandwidth would say where it stops"
    )
    assert not re.search(r"\b1 (workers|ranks|micro-batches|calls|views)", text(made))
    assert "64 = 1 micro-batch x 1 rank x 64" in text(made)
    assert "by 1 worker" in text(made)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_on_gpus_it_goes_to_512_of_them(device: str) -> None:
    made = make_plan(paper(device=device), samples=IMAGENET)
    header, *lines = other_ranks(made)
    assert "exchange" not in header
    assert [line[0] for line in lines] == ["1", "8", "64", "512"]
    assert "--gpu NAME or --images-per-second and --bandwidth" in text(made)
    known = make_plan(paper(device=device), samples=IMAGENET, machines=H100)
    assert other_ranks(known)[0][-6:] == ["compute", "exchange", "images/s", "of", "linear", "time"]
    assert [line[0] for line in other_ranks(known)[1:]] == ["1", "8", "64", "512"]


def test_columns_of_which_something_is_known_stay() -> None:
    measured = make_plan(paper(), samples=IMAGENET, machines=Machines(images_per_second=400.0))
    assert other_ranks(measured)[0][-3:] == ["compute", "images/s", "time"]
    assert text(measured).endswith("\nnetwork is not known: --bandwidth would say where it stops")
    network = make_plan(paper(), samples=IMAGENET, machines=Machines(bandwidth=bandwidth("25Gbit")))
    assert other_ranks(network)[0][-4:] == ["sent", "a", "step", "exchange"]
    assert "speed is not known: --gpu NAME or --images-per-second would say where it stops" in text(network)


def test_names_and_units() -> None:
    assert gpu("H100").peak["bf16"] == 989e12
    assert gpu("24GiB").memory == 24 * 2**30
    assert bandwidth("25Gbit") == 25e9 / 8
    assert bandwidth("25GB/s") == 25e9
    assert seconds("0.3ms") == pytest.approx(3e-4)
    for parse, wrong in (
        (gpu, "h1000"),
        (gpu, "24"),
        (gpu, "1GiB"),
        (bandwidth, "25"),
        (bandwidth, "0Gbit"),
        (bandwidth, "25Gb/s"),  # bits: not 25 GB/s
        (bandwidth, "25gb/s"),
        (seconds, "fast"),
    ):
        with pytest.raises(ConfigError, match=f"--.*{wrong}"):
            parse(wrong)


GPUS = re.search(r"known: (.*), or its memory", refusal_of_gpu("none"))[1].split(", ")


@pytest.mark.parametrize("name", GPUS)
def test_a_gpus_figures_have_their_sheet(name: str) -> None:
    found = gpu(name)
    assert re.fullmatch(r"https://[^ ]+", found.sheet)
    assert 8 * 2**30 <= found.memory * 1.003 <= 200 * 2**30
    assert found.peak["fp64"] < found.peak["fp32"] < found.peak["fp16"]
    assert ("bf16" in found.peak) == (name != "t4" and not name.startswith("v100"))


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("RTX 4090", "rtx4090"), ("NVIDIA GeForce RTX 4090", "rtx4090"), ("RTX A6000", "a6000"), ("Tesla T4", "t4"),
        ("AMD Instinct MI300X", "mi300x"), ("NVIDIA L40S", "l40s"), ("RTX 5070 Ti", "rtx5070ti"),
    ],
)  # fmt: skip
def test_a_gpu_may_have_the_name_that_the_driver_says(typed: str, name: str) -> None:
    assert gpu(typed).name == name


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("h1000", "h100"), ("a100", "a100-40"), ("v100", "v100-16"), ("mi300", "mi300x"), ("4090", "rtx4090"),
        ("rxt3090", "rtx3090"), ("RTX 4900", "rtx4090"),
        ("rtx3090ti", "rtx3090"), ("rtx4060ti", "rtx4060ti-16"), ("l40", "l40s"), ("h100-80", "h100"),
    ],
)  # fmt: skip
def test_a_misspelt_gpu_is_answered_with_its_near_name(typed: str, name: str) -> None:
    assert f"{typed!r} is unknown; did you mean '{name}'?" in refusal_of_gpu(typed)


@pytest.mark.parametrize("other", ["a5000", "h800", "b100", "rtx2080", "a4000"])
def test_another_number_is_another_gpu(other: str) -> None:
    assert re.search(f"'{other}' is unknown; known: t4, .*, or its memory, as 24GiB$", refusal_of_gpu(other))


def test_need_and_budget_are_two_numbers() -> None:
    config = paper(global_batch_size=256, precision="bf16")
    made = make_plan(config, samples=IMAGENET, machines=Machines(gpu=gpu("a100-40")))
    (line,) = [line[28:] for line in text(made).splitlines() if line.startswith("fits a100-40")]
    need, budget = made.step.memory.peak / 2**30, (40_536 / 2**10 - 1.5) * 0.95
    assert line.startswith(
        f"yes: needs {need:.2f} GiB of a budget of {budget:.2f} GiB, with 1 micro-batch; the fewest that fit: 1;"
    )
    assert line.endswith("the budget is its 39.59 GiB less 1.50 GiB for CUDA and NCCL, and 5 % of gaps: assumed")
    assert made.values()["gpu"]["budget"] == pytest.approx(budget * 2**30)


def test_a_short_run_is_told_in_minutes() -> None:
    for steps, told in ((10, "25.6 s"), (1800, "76.8 min"), (10_000, "7.1 hours")):
        config = paper(epochs=None, steps=steps, global_batch_size=1024, optim=OptimConfig(warmup_steps=0))
        made = make_plan(config, samples=IMAGENET, machines=Machines(images_per_second=400.0))
        (line,) = [line[28:] for line in text(made).splitlines() if line.startswith("speed")]
        assert line == f"400 images/s: {told} for {steps} steps"
        assert other_ranks(made)[1][-2:] == told.split()


def test_exact_pieces_are_dealt_whole() -> None:
    """256 images in pieces of 32: 8 ranks have one each, and 512 none."""
    config = paper(global_batch_size=256, deterministic="exact", device="cpu", model=ModelConfig("resnet10"))
    plan = make_plan(config, samples=IMAGENET, world_size=4)
    assert "(DDP's buckets included)" not in text(plan)
    assert [(step.ranks, step.images) for step in plan.scales if isinstance(step, Step)] == [
        (1, 256),
        (2, 128),
        (4, 64),
        (8, 32),
    ]
    on_gpus = make_plan(dataclasses.replace(config, device="auto"), samples=IMAGENET, machines=H100)
    last = on_gpus.scales[-1]
    assert isinstance(last, NoStep)
    assert last.why == "256 images cannot be dealt to 512, 32 at a time"
    pieces = make_plan(config, samples=IMAGENET, machines=Machines(gpu=gpu("2GiB"))).scales
    assert all(step.images % 32 == 0 for step in pieces if isinstance(step, Step))
