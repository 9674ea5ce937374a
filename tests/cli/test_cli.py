"""The command line: quick to answer, and every mistake is one line and exit code 2."""

import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simclr_dist import __version__
from simclr_dist.cli import main as cli
from simclr_dist.cli import manual
from simclr_dist.cli.main import main
from simclr_dist.config import together
from simclr_dist.config.load import load_config
from simclr_dist.config.settings import Config
from simclr_dist.config.strict_yaml import read_yaml
from simclr_dist.convert.shards import write_shards
from simclr_dist.run.folder import open_run
from simclr_dist.run.status import read_status
from simclr_dist.system import stdout, version
from simclr_dist.system.errors import PREEMPTED, UserError
from terminal import terminal

IMAGES = 24
VERBS = (
    "demo",
    "shard",
    "train",
    "eval",
    "finetune",
    "embed",
    "neighbours",
    "duplicates",
    "export",
    "submit",
    "status",
    "runs",
    "plan",
    "check",
)

CONFIG = """
run_folder: run
global_batch_size: 8
micro_batches: 2
steps: 3
device: cpu
data: {shards: shards, workers: 0}
views: {preset: small, image_size: 16}
model: {encoder: resnet10, stem: small_stride2, projector_hidden: 8, projector_dim: 4}
optim: {warmup_steps: 1}
"""

Answer = tuple[int, str, str]
Command = Callable[..., Answer]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    random = np.random.default_rng(0)
    for i in range(IMAGES):
        path = folder / "images" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    write_shards(folder / "images", folder / "shards", shard_size=10, processes=1, progress=False)
    return folder


@pytest.fixture
def here(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with config.yaml, shards/ and images/."""
    shutil.copytree(shards, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    """`simclr-dist ARGUMENTS` in this process: exit code, stdout, stderr."""

    def run(*arguments: str) -> Answer:
        capfd.readouterr()
        try:
            code = main(arguments)
        except SystemExit as ended:
            code = 2 if ended.code is None else int(ended.code)
        return code, *capfd.readouterr()

    return run


def refused(answer: Answer) -> str:
    """The one line of a command that was refused."""
    code, out, err = answer
    assert code == 2, (out, err)
    assert out == ""
    assert err.startswith("simclr-dist: ")
    assert err.count("\n") == 1, err
    assert err.endswith("\n")
    return err.removeprefix("simclr-dist: ").rstrip("\n")


# Bad input


def test_missing_shards(here: Path, command: Command) -> None:
    shutil.rmtree("shards")
    assert refused(command("train", "config.yaml")).startswith("shards: no such folder of shards; make one with")
    assert refused(command("train", "config.yaml", "--data.shards", "other")).startswith("other: no such folder")
    assert refused(command("plan", "config.yaml")).startswith("data.shards: 'shards' is not here; give the number of images")
    assert not Path("run").exists()


def test_a_missing_shard_and_a_manifest_that_does_not_match_its_tars(here: Path, command: Command) -> None:
    tar = sorted(Path("shards").glob("*.tar"))[1]
    with tar.open("ab") as file:
        file.write(b"\0" * 512)
    assert str(tar) in refused(command("train", "config.yaml"))
    tar.unlink()
    assert str(tar) in refused(command("train", "config.yaml"))
    Path("shards/manifest.parquet").write_bytes(b"not parquet")
    assert refused(command("train", "config.yaml")).startswith("shards/manifest.parquet: not a readable Parquet file")
    assert not Path("run").exists()


def test_empty_folders(here: Path, command: Command) -> None:
    Path("empty").mkdir()
    line = refused(command("train", "config.yaml", "--data.shards", "empty"))
    assert line.startswith("empty: has no manifest.parquet")
    assert refused(command("shard", "empty", "new", "--processes", "1")).startswith("empty")
    assert refused(command("shard", "nowhere", "new", "--processes", "1")).startswith("nowhere")
    assert not Path("new").exists()


def test_the_folder_above_the_shards_is_met_with_the_right_one(here: Path, command: Command) -> None:
    assert "name one of shards" in refused(command("train", "config.yaml", "--data.shards", "."))


def test_a_text_file_that_is_called_jpg(here: Path, command: Command) -> None:
    Path("images/class0/letter.jpg").write_text("Dear reader")
    assert "letter.jpg" in refused(command("shard", "images", "new", "--processes", "1", "--strict"))
    assert not Path("new").exists()


@pytest.mark.parametrize("split", ["0.8", "0.8/0.3", "nan/0.5", "0.5/0.3/0.1", "1/0"])
def test_a_bad_split(here: Path, command: Command, split: str) -> None:
    line = refused(command("shard", "images", "new", "--split", split))
    sides = "shares above 0 of train and test, or of train, val and test"
    assert line == f"split: {split} must be {sides}, that add up to 1, like 0.8/0.2 or 0.8/0.1/0.1"
    for text in ("x/y", ""):
        line = refused(command("shard", "images", "new", "--split", text))
        assert f"argument --split: invalid /-separated value: {text!r}" in line


def test_a_config_typo(here: Path, command: Command) -> None:
    Path("config.yaml").write_text(CONFIG + "loss: {temprature: 0.1}\n")
    for verb in ("train", "plan", "check"):
        line = refused(command(verb, "config.yaml"))
        assert line == "config.yaml: loss.temprature: unknown key; did you mean 'loss.temperature'?"
    missing = "none.yaml: cannot read the config: No such file or directory"
    assert refused(command("train", "none.yaml")) == f"{missing}; write one: `simclr-dist train --help` lists its keys"
    assert refused(command("train", "confg.yaml")).endswith("; did you mean 'config.yaml'?")


def test_a_global_batch_larger_than_the_data(here: Path, command: Command) -> None:
    line = refused(command("train", "config.yaml", "--global_batch_size", "26"))
    assert line == "global_batch_size: 26 is larger than the 24 images of shards; lower it, or add images"


def test_what_this_machine_cannot_have(here: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "most_processes", lambda: 9)
    line = refused(command("train", "config.yaml", "--data.workers", "4", "--processes", "2"))
    assert line == "data.workers: 4 for each of 2 ranks are 10 processes; this machine allows 9; lower it"
    assert not Path("run").exists()


def test_a_global_batch_that_is_not_divided(here: Path, command: Command) -> None:
    line = refused(command("train", "config.yaml", "--processes", "3"))
    assert line == "global_batch_size: 8 is not divided by 3 processes x 2 micro_batches; 6 would be"
    assert "micro_batches: 3 does not divide" in refused(command("train", "config.yaml", "--micro_batches", "3"))
    assert refused(command("plan", "config.yaml", "--processes", "3")) == line


def test_a_global_batch_that_the_gpus_of_this_machine_do_not_divide(
    here: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert "not divided by 3 processes" in refused(command("train", "config.yaml", "--device", "auto"))


def test_a_run_folder_of_another_run(here: Path, command: Command) -> None:
    open_run(load_config("config.yaml", ["--seed", "5"]), {}).release()
    line, other = refused(command("train", "config.yaml")), "run_folder: 'run' holds another run (seed: 5 -> 0);"
    assert line == f"{other} nothing is saved in it: remove it, name another folder, or undo the change"
    Path("run/checkpoints/step-00000001.pt").touch()
    assert refused(command("train", "config.yaml")) == f"{other} name another folder, or undo the change"
    Path("run/checkpoints/step-00000001.pt").unlink()
    assert "is not a run folder" in refused(command("train", "config.yaml", "--run_folder", "images"))


@pytest.mark.parametrize("content", [b"not an encoder", b""])
def test_an_encoder_file_that_is_not_one(here: Path, command: Command, content: bytes) -> None:
    Path("e.safetensors").write_bytes(content)
    line = refused(command("eval", "e.safetensors", "--train", "shards", "--test", "shards", "--device", "cpu"))
    assert line.startswith("e.safetensors: ")
    assert refused(command("eval", "none.safetensors", "--train", "shards", "--test", "shards")).startswith(
        "none.safetensors: "
    )


@pytest.mark.parametrize("card", ["{}", "[]", "null", '{"encoder": "vgg", "width": 1, "stem": "small"}'])
def test_a_foreign_safetensors_file(here: Path, command: Command, card: str) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1)}, "e.safetensors", metadata={"card": card})
    line = refused(command("eval", "e.safetensors", "--train", "shards", "--test", "shards", "--device", "cpu"))
    assert line.startswith("e.safetensors: not an encoder that this program exported")


# The command line itself


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["trian"], "invalid choice: 'trian'"),
        (["--bogus"], "--bogus"),
        (["shard", "a", "b", "--bogus", "1"], "unrecognized arguments: --bogus 1; see `simclr-dist shard --help`"),
        (["shard", "a"], "usage: simclr-dist shard SRC DST, or --index DIR, or --verify DST"),
        (["shard", "a", "b", "--shard-size", "0"], "shard_size: 0 is too small; the least is 1"),
        (["shard", "a", "b", "--shard-size", "many"], "invalid int value: 'many'"),
        (["eval", "e", "--train", "a"], "required: --test"),
        (["eval", "e", "--train", "a", "--test", "b", "--bogus", "1"], "unrecognized arguments: --bogus"),
        (["train"], "usage: simclr-dist train CONFIG"),
        (["train", "config.yaml", "--processes", "0"], "--processes: 0 is too small; the least is 1"),
        (["train", "config.yaml", "--bogus", "1"], "command line: bogus: unknown key"),
        (["train", "config.yaml", "--proc", "2"], "command line: proc: unknown key"),
        (["train", "config.yaml", "--proceses", "2"], "command line: proceses: unknown key; did you mean 'processes'?"),
        (["train", "config.yaml", "--optim.lr", "2"], "command line: optim.lr: unknown key; did you mean 'optim.base_lr'?"),
        (["train", "config.yaml", "--batch-size", "2"], "unknown key; did you mean 'global_batch_size'?"),
        (["train", "config.yaml", "--seed"], "command line: --seed: its value is missing"),
        (["train", "config.yaml", "seed", "3"], "command line: 'seed': expected --key value"),
        (["plan"], "required: config"),
        (["plan", "config.yaml", "--samples", "0"], "samples: 0 is too small; the least is 1"),
        (["check", "--only", "everything"], "invalid choice: 'everything'"),
        (["check", "--only", "shards"], "--only shards: has nothing to look at without a CONFIG"),
        (
            ["plan", "config.yaml", "--device", "auto", "--gpu", "h100", "--utilisation", "0.3", "--images-per-second", "9"],
            "--utilisation, --images-per-second, --measure: each says how fast a rank is; give one of them",
        ),
        (
            ["plan", "config.yaml", "--latency", "5us"],
            "--latency: '5us' has no effect without --bandwidth; give both, or leave it out",
        ),
        (["plan", "config.yaml", "--bandwidth", "1Gbit", "--latency", "5"], "--latency: '5' is not a time like 20us or 0.3ms"),
        (["check", "--seed=3"], "unrecognized arguments: --seed=3"),
    ],
)
def test_wrong_command_lines(here: Path, command: Command, arguments: list[str], part: str) -> None:
    assert part in refused(command(*arguments))


def test_overrides_and_options_may_be_mixed(here: Path, command: Command) -> None:
    """Each is read, whatever stands between; -1e-3 is a value and no option."""
    given = ["--seed", "3", "--processes", "2", "--optim.weight_decay", "-1e-3", "--log.every=2"]
    assert "optim.weight_decay: -0.001 is too small" in refused(command("train", "config.yaml", *given))
    given[5] = "1e-3"
    assert "not divided by 5 processes" in refused(command("train", "config.yaml", *given, "--processes", "5"))
    open_run(load_config("config.yaml"), {}).release()
    line = refused(command("train", "config.yaml", *given))
    assert "(seed: 0 -> 3; optim.weight_decay: 1e-06 -> 0.001)" in line


def test_no_verb_shows_the_verbs_and_is_no_success(command: Command) -> None:
    code, out, err = command()
    assert (code, err) == (2, "")
    assert all(verb in out for verb in VERBS)


def test_help_and_version(command: Command) -> None:
    for verb in VERBS:
        code, out, err = command(verb, "--help")
        assert (code, err) == (0, "")
        assert out.startswith(f"usage: simclr-dist {verb}")
        assert "\nexamples:\n  simclr-dist " in out
    code, out, err = command("--help")
    assert (code, err) == (0, "")
    for number in (0, 1, 2, 3, PREEMPTED, 130, 141):
        assert re.search(rf"^  {number} +[a-z]", out, re.MULTILINE), number


@pytest.mark.parametrize(("verb", "line"), [(verb, line) for verb, lines in manual.EXAMPLES.items() for line in lines])
def test_examples_are_commands_that_are_understood(verb: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to what they name: shards, runs and photos."""
    monkeypatch.chdir(Path(__file__).parents[2])
    program, *arguments = shlex.split(line)
    known, rest = cli.make_parser().parse_known_args(arguments)
    assert (program, known.verb) == ("simclr-dist", verb)
    if getattr(known, "config", None) is None:
        assert not rest
    elif known.config in ("shard", "embed", "eval"):
        cli.make_parser().parse_args([known.config, *rest])
    elif known.config not in ("status", "logs", "cancel", "resume"):
        config = Path(known.config) if known.config != "my.yaml" else Path("configs/cifar10_cpu.yaml")
        load_config(config, rest)
    assert set(manual.EXAMPLES) == set(VERBS)


def test_version_says_what_it_runs_on(command: Command) -> None:
    import torch

    code, out, err = command("--version")
    assert (code, err) == (0, "")
    first, *rows = out.splitlines()
    assert re.fullmatch(rf"simclr-dist {re.escape(__version__)}( \(git [0-9a-f]{{12}}(, changed since)?\))?", first)
    found = dict(row.split(maxsplit=1) for row in rows)
    assert list(found) == ["python", "torch", "torchvision", "triton", "nccl", "gpus", "driver", "platform"]
    assert found["python"].startswith(platform.python_version())
    assert found["torch"].split(", ")[0] == importlib.metadata.version("torch")
    assert found["torch"].split(", ")[1] == (f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only")
    if torch.version.cuda:
        assert found["nccl"].startswith(".".join(map(str, torch.cuda.nccl.version())))


def test_version_of_gpus_and_of_an_installation_without_torch(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the driver's files have it, on a machine with two GPUs."""
    for number in range(2):
        file = tmp_path / "gpus" / str(number) / "information"
        file.parent.mkdir(parents=True)
        file.write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 120\n")
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:18:02 UTC 2025\nGCC version: 12.2.0\n"
    )
    monkeypatch.setattr(version, "_DRIVER", tmp_path)
    out = command("--version")[1]
    assert "gpus         NVIDIA H100 80GB HBM3, NVIDIA H100 80GB HBM3\ndriver       580.65.06\n" in out
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.133.20  Release Build  (dvs)\n"
    )
    assert "driver       570.133.20\n" in command("--version")[1]
    assert version._installed("no-such-package") == "not installed"
    assert version._built_for("no-such-package") is None


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_ends_it_quietly(here: Path, unbuffered: str) -> None:
    """Whether the reader has gone before the first word, or in the middle."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment["PYTHONUNBUFFERED"] = unbuffered
    for line in ("--help", "train --help", "train config.yaml --help", "eval --help", "--version", "plan config.yaml", ""):
        for reader in ("true", "head -n 1"):
            if line.startswith("plan") and (reader == "true") == bool(unbuffered):
                continue  # it imports torch: once for the flush that fails at the end, once for the print that fails before
            shell = f'{{ sleep 0.1; simclr-dist {line}; }} | {reader}; echo "${{PIPESTATUS[@]}}"'
            done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env=environment, check=True)
            assert done.stderr == "", line
            code = int(done.stdout.splitlines()[-1].split()[0])
            assert code == 141 if reader == "true" else code in (0, 2, 141), line


NO_ROOM = "simclr-dist: standard output: cannot be written: No space left on device\n"


def to_a_full_disk(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    with Path("/dev/full").open("w") as full:
        return subprocess.run(
            [Path(sys.executable).with_name("simclr-dist"), *line.split()],
            stdout=full, stderr=subprocess.PIPE, text=True, env=os.environ | environment, check=False,
        )  # fmt: skip


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_a_full_disk_does_not_take_is_said_once(here: Path, unbuffered: str) -> None:
    """Whether the print meets it, or the flush behind the last one."""
    for line in (
        "--help",
        "train --help",
        "train config.yaml --help",
        "--version",
        "--print-completion bash",
        *(["plan config.yaml"] if unbuffered else []),  # it and the next import torch: one for each way
        "",
    ):
        done = to_a_full_disk(line, PYTHONUNBUFFERED=unbuffered)
        assert (done.returncode, done.stderr) == (2, NO_ROOM), line
    if unbuffered:
        return
    done = to_a_full_disk("shard images new --processes 1", PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 2
    assert done.stderr.endswith(NO_ROOM)
    assert "Traceback" not in done.stderr
    assert Path("new/manifest.parquet").exists(), "what was done stays"


@pytest.mark.slow
def test_ranks_whose_output_a_full_disk_does_not_take(here: Path) -> None:
    done = to_a_full_disk("check config.yaml --only shards --processes 2")
    assert (done.returncode, done.stderr) == (2, NO_ROOM)


def test_a_file_on_a_full_disk_is_not_taken_for_the_output(capfd: pytest.CaptureFixture[str]) -> None:
    with Path("/dev/full").open("w") as file:
        with stdout.checked(), pytest.raises(OSError, match="No space left") as caught:
            print("lost", file=file, flush=True)
        assert not isinstance(caught.value, UserError)
        with pytest.raises(OSError, match="No space left"):
            file.close()
    with stdout.checked():
        print("taken")
    assert capfd.readouterr().out == "taken\n"


def test_shard_ends_with_what_comes_next(here: Path, command: Command) -> None:
    code, out, _ = command("shard", "images", "data/mine", "--split", "0.5/0.5", "--processes", "1")
    assert (code, Path("data/mine/train/manifest.parquet").exists()) == (0, True)
    assert out.partition("\n\nNext:\n  ")[2].endswith("simclr-dist train CONFIG --data.shards data/mine/train\n")


@pytest.mark.parametrize("setting", [{}, {"NO_COLOR": "1"}])
def test_plain_text_where_no_terminal_is(here: Path, setting: dict[str, str]) -> None:
    """Nor with NO_COLOR on a terminal, where a bar may move the cursor."""
    program = Path(sys.executable).with_name("simclr-dist")
    for arguments in (["train", "--help"], ["train", "config.yaml", "--sead", "1"], ["shard", "images", f"new{len(setting)}"]):
        if setting:
            with terminal([program, *arguments], here, setting) as shell:
                shell.close()
                assert not re.search(r"\x1b\[[0-9;]*m", shell.raw)
        else:
            done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
            assert not {"\x1b", "\r"} & set(done.stdout + done.stderr)


def test_train_help_lists_every_setting_with_its_meaning(here: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = command("train", "--help")
    assert (code, err) == (0, "")
    for section, values in Config().to_dict().items():
        names = [f"{section}.{name}" for name in values] if isinstance(values, dict) else [section]
        for name in names:
            assert f"--{name.replace('_', '-')} " in out, name
    assert "--no-compile" not in out, "true and false are values, as in YAML"
    for meaning in (
        "Divides the cosine similarities",
        "Images a step over all ranks",
        "(default: 4096)",
        "linear,sqrt,constant",
    ):
        assert meaning in out
    code, out, _ = command("train", "config.yaml", "--help")
    assert code == 0
    assert "(default: 8)" in out
    assert "(default: 4096)" not in out
    Path("config.yaml").write_text(CONFIG + "sead: 1\n")
    assert "did you mean 'seed'" in refused(command("train", "config.yaml", "--help"))


def test_plan_prints_a_table(here: Path, command: Command) -> None:
    code, out, err = command("plan", "config.yaml", "--processes", "2", "--global-batch-size", "12")
    assert (code, err) == (0, "")
    assert "24; 2 steps an epoch, 0 left over" in out
    assert "12 = 2 micro-batches x 2 ranks x 3" in out
    shutil.rmtree("shards")
    code, out, _ = command("plan", "config.yaml", "--samples", "1000")
    assert code == 0
    assert "1000; 125 steps an epoch" in out


def test_shard_says_what_it_did_and_writes_what_train_takes(here: Path, command: Command) -> None:
    for i in range(12):
        Path(f"images/class0/letter{i:02d}.jpg").write_text(f"Dear reader {i}")
    arguments = ["--split", "0.75/0.25", "--shard-size", "5", "--processes", "1"]
    code, out, _ = command("shard", "images", "new", *arguments)
    assert code == 0
    assert "24 images in 6 shards" in out
    assert "2 classes" in out
    assert out.count("left out: ") == 11, "ten, and how many in all"
    assert "letter00.jpg: " in out
    assert "left out: 12 in all, listed in new/rejected.jsonl" in out
    assert re.search(r"^written to (\S+/)?new/train \(18 images\), (\S+/)?new/test \(6 images\)$", out, re.MULTILINE)
    assert len(Path("new/rejected.jsonl").read_text().splitlines()) == 12
    line = refused(command("train", "config.yaml", "--data.shards", "new/train", "--global_batch_size", "20"))
    assert "larger than the 18 images" in line


# Quick


WITHOUT_TORCH = """
import sys
from simclr_dist.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as ended:
    code = ended.code
assert "torch" not in sys.modules
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["eval", "--help"], 0),
        (["train", "--help"], 0),
        (["train", "config.yaml", "--help"], 0),
        (["train", "config.yaml", "--sead", "1"], 2),
        (["train", "config.yaml", "--data.shards", "none"], 2),
        (["train", "config.yaml", "--global_batch_size", "26"], 2),
        (["train", "config.yaml", "--run_folder", "images"], 2),
        (["check", "config.yaml", "--sead", "1"], 2),
        (["shard", "none", "new"], 2),
    ],
)
def test_answers_without_torch(here: Path, arguments: list[str], code: int) -> None:
    """A tenth of a second each, where importing torch takes seconds; the limit is for a busy machine."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == (1 if code else 0), done.stderr


def test_the_installed_command_exits_with_the_code(here: Path) -> None:
    program = Path(sys.executable).with_name("simclr-dist")
    done = subprocess.run([program, "train", "config.yaml", "--sead", "1"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "simclr-dist: command line: sead: unknown key; did you mean 'seed'?\n"


def launch(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("words", [("simclr_dist.train",), ("simclr_dist", "train")], ids=" ".join)
def test_under_torchrun_one_rank_says_it(here: Path, words: tuple[str, ...]) -> None:
    """torchrun adds its own noise; what is wrong is still one line, from one rank. Both spellings make ranks, not launchers."""
    done = launch(2, *words, "config.yaml", "--global_batch_size", "8", "--micro_batches", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done: 3 steps") == 1
    assert read_status(Path("run"))["state"] == "done"
    done = launch(2, *words, "config.yaml", "--global_batch_size", "26")
    assert done.returncode == 1, "torchrun's code for any failure"
    ours = [line for line in done.stderr.splitlines() if "simclr-dist: " in line]
    assert ours == ["simclr-dist: global_batch_size: 26 is larger than the 24 images of shards; lower it, or add images"]
    assert 'simclr_dist/train.py", line' not in done.stderr, "no traceback of ours"


@pytest.mark.slow
def test_a_run_is_entered_again_from_the_command_line(here: Path, command: Command) -> None:
    """3 steps, then 5 of the same run, in fresh processes; the code is that of the run."""
    program = Path(sys.executable).with_name("simclr-dist")
    for steps in ("3", "5"):
        arguments = ["train", "config.yaml", "--steps", steps, "--views.interpolation", "bilinear", "--log.every", "1"]
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "resumed at step 3" in done.stdout
    metrics = [read_yaml(line, "metrics")["step"] for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert metrics == [1, 2, 3, 4, 5]
    assert "done: 5 steps" in done.stdout
