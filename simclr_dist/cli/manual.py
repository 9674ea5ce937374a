"""Hold the help: what each verb is for, examples, exit codes. It also says how to go on after Ctrl-C."""

import argparse
from collections.abc import Mapping

EXIT_CODES = """exit codes:
  0    done
  1    crash, or a check that failed
  2    usage, config or data error, or no room for what is written: one line says what to change
  3    training diverged: its numbers stopped being finite
  75   stopped by Ctrl-C, a scheduler's signal or a lost terminal, with all saved: the same command goes on
  130  interrupted by Ctrl-C in a verb other than train, eval, finetune, embed, submit, or by a second Ctrl-C
  141  whoever read the output has gone (`simclr-dist ... | head`)"""

START = """from images to a measured encoder:
  simclr-dist shard PHOTOS data/mine --split 0.8/0.2
  simclr-dist plan my.yaml
  simclr-dist train my.yaml
  simclr-dist eval runs/mine/encoders/step-00001000.safetensors --train data/mine/train --test data/mine/test

`simclr-dist VERB --help` has examples for each verb."""

ABOUT = {
    "shard": """Write WebDataset tars and a Parquet manifest. Every image is decoded once; what is not an image is listed with
its reason and left out. The same input, settings and seed give the same bytes, for any number of processes and parts.
A run that was killed goes on when the same command is typed again.

SRC is a folder of images, or of class folders, or a file of one of these kinds; a folder of such files, or a pattern in quotes:
  archive of a folder: .tar, .zip            ImageNet's ILSVRC2012_img_train.tar, and
  Parquet, Arrow (Hugging Face's layout)     ImageNet's ILSVRC2012_img_val.tar with its classes beside it
  list in CSV: path,label                    CIFAR's binary files (CIFAR's Python version is pickled: refused)
  LMDB                                       STL-10's binary files
  TFRecord (simclr_dist[tfrecord])           MedMNIST's .npz: x.npz/train
  MosaicML's MDS, or LitData                 Lance: named with its converter""",
    "demo": """The first run, without any data: 6,000 images are drawn, sharded, trained on and evaluated, in some minutes on
two CPU cores. Ends with a table of what was learned, a picture, and the commands that come next.""",
    "eval": """How good are an encoder's features? Every labelled image is read once, the encoder stays as it is, and kNN and
a linear probe are measured beside raw pixels and an untrained encoder. Writes a table, a JSON file and a page. With several
encoders, --rival or --labels they stand side by side, and a line says of each what the first one is above, and how surely.""",
    "finetune": """Train an encoder further with labels, all or a small part of them, and measure it on test images. The
encoder's file stays as it is.""",
    "embed": """The features of your own images, a row an image: in Parquet for pandas, polars or DuckDB, in a .npz for NumPy.
With --map also a picture of the images as points: what is alike for the encoder lies near.""",
    "neighbours": """Look for your pictures' like among shards: a page with the nearest images of each, and a Parquet table.
Features of the shards are kept (RUN/eval/features), so that the next question is quick.""",
    "duplicates": """Which images of a set are alike, or, with --among, which test images has the training seen? A page of
groups, the nearest first, and a Parquet table of pairs, which says where bytes or pixels are equal.""",
    "export": """The encoder as ONNX, for programs without PyTorch; its output is compared with torch's. Needs
`pip install onnx onnxruntime onnxscript`. Or a new folder for a model hub: weights, a card with results.
Of a run that was stopped, `export RUN` writes the encoder of its last checkpoint into the run.""",
    "plan": """What a config will need, before it runs: memory, network, hours. With --measure by a minute of its steps.""",
    "check": """Try on these machines what training needs: versions, network, clocks, the gradient of all ranks against that of
one process (in float64), shards, shared memory, run folder, SLURM's settings. Leaves nothing behind. With --loss: is
the gradient of another library's loss, or of your own, right on 1, 2, 4 ranks, and what is wrong else?""",
    "runs": """Runs side by side: the settings that differ, state, steps, accuracy (of the newest evaluated encoder, and of the
best where that is another), loss, speed and cost. Reads run folders only: it starts nothing, and the runs may be at work.""",
    "status": """How a run stands, here or on another machine: state and reason, who holds it, step, time left, loss,
checkpoint, newest encoder and its accuracy, and the command that comes next. Several runs make the table of `runs`. Reads
run folders only: it starts and writes nothing, and asks no SLURM (`submit status` does).""",
    "submit": """Train on a SLURM cluster, with an evaluation behind it if you like. Preempted, requeued and timed-out jobs go
on by themselves. With --sweep many runs, as one job array. `submit shard` converts in parts, as an array with a job behind
it that writes the tars; typed again, it sends what is left. `submit embed` and `submit eval` are a job of the profile's
ranks. The later forms take a run's folder, or what the other verbs write.""",
    "train": """Pre-train an encoder on all GPUs of this machine, or with one process on its CPUs. A run that was stopped or
killed goes on when the same command is given again. With --sweep several runs, one after another, and their table.""",
}

_COMMANDS = """\
demo
demo --folder runs/first --processes 1
shard PHOTOS data/mine
shard PHOTOS data/mine --split 0.8/0.2 --short-side 256
shard PHOTOS data/mine --split 0.8/0.1/0.1
shard images.parquet data/mine --strict
train configs/cifar10_cpu.yaml
train my.yaml --processes 2 --global_batch_size 512 --loss.temperature 0.2
train my.yaml --run_folder runs/sweep --sweep optim.base_lr=0.1,0.3 --sweep seed=0,1
train my.yaml --nnodes 2 --rdzv-endpoint 10.0.0.1:29500
eval runs/mine/encoders/step-00001000.safetensors --train data/mine/train --test data/mine/test
eval runs/mine/encoders/step-00001000.safetensors --train data/mine/train --val data/mine/val --test data/mine/test
eval runs/mine/encoders/step-00001000.safetensors --rival torchvision/resnet50 --train data/mine/train --test data/mine/test
eval --labels 0.01/0.1/1 --protocols linear,finetune a.safetensors --train data/mine/train --test data/mine/test
eval --watch runs/mine --train data/mine/train --test data/mine/test
eval --arch resnet50 --weights published.pth --train data/mine/train --test data/mine/test
eval --arch timm/vit_small_patch16_224 --weights dino.pth --train data/mine/train --test data/mine/test
finetune runs/mine/encoders/step-00001000.safetensors --train data/mine/train --test data/mine/test --labels 0.01
embed runs/mine/encoders/step-00001000.safetensors PHOTOS features.parquet
embed runs/mine/encoders/step-00001000.safetensors data/mine/test features.npz --map map.png
neighbours runs/mine/encoders/step-00001000.safetensors cat.jpg dog.jpg --among data/mine/train
duplicates runs/mine/encoders/step-00001000.safetensors data/mine/train
duplicates runs/mine/encoders/step-00001000.safetensors data/mine/test --among data/mine/train --above 0.98
export runs/mine/encoders/step-00001000.safetensors encoder.onnx
export runs/mine/encoders/step-00001000.safetensors my-encoder --license apache-2.0
export runs/mine
submit my.yaml --profile launch/profiles/gpu8.yaml --dry-run
submit my.yaml --profile launch/profiles/gpu8.yaml --eval --train data/mine/train --test data/mine/test
submit my.yaml --profile launch/profiles/gpu8.yaml --run_folder runs/sweep --sweep optim.base_lr=0.1,0.3 --dry-run
submit shard PHOTOS data/mine --parts 32 --profile launch/profiles/cpu_parts.yaml --dry-run
submit status runs/mine
status
status runs/mine
runs runs/mine runs/other
runs runs/sweep --csv sweep.csv --picture sweep.png --over images
plan configs/imagenet_resnet50.yaml --processes 8 --samples 1281167
plan my.yaml --measure --processes 2
check
check my.yaml --processes 4
check --loss lightly.loss:NTXentLoss --loss-args temperature=0.1,gather_distributed=true"""
EXAMPLES = {verb: [f"simclr-dist {line}" for line in _COMMANDS.splitlines() if line.split()[0] == verb] for verb in ABOUT}

# Said after Ctrl-C by verbs that have no better word of their own.
_AFTER_CTRL_C = {
    "demo": "finished parts stay, and the same command goes on",
    "shard": "DST is not there yet, and the same command goes on from DST.partial",
    "export": "nothing is written, and the same command starts again",
    "train": "the same command goes on from the last checkpoint",
    "submit": "jobs that were sent go on by themselves: `squeue --me` lists them",
}


def interrupted(verb: str) -> str:
    """Return the line that ends `verb` after Ctrl-C."""
    return f"interrupted; {_AFTER_CTRL_C.get(verb, 'the same command starts again')}"


def fill_in(parser: argparse.ArgumentParser, verbs: Mapping[str, argparse.ArgumentParser]) -> None:
    """Give the program and its verbs their descriptions, examples and exit codes. Lines stay as they are here.

    An option without a metavar gets N for a whole number, X for another number, and not its own name in capitals.
    """
    parser.formatter_class = _Layout
    parser.epilog = f"{START}\n\n{EXIT_CODES}"
    for name, verb in verbs.items():
        verb.formatter_class = _Layout
        verb.description = ABOUT[name]
        verb.epilog = "\n  ".join(["examples:", *EXAMPLES[name]])
        for action in verb._actions:
            if action.option_strings and action.metavar is None and action.choices is None and action.nargs != 0:
                action.metavar = {"int": "N", "float": "X"}.get(getattr(action.type, "__name__", ""))


class _Layout(argparse.RawDescriptionHelpFormatter):
    """Layout of the help. Lines of descriptions and examples stay as they are, and long options have room."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)
