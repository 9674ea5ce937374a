"""Define every setting of a run: type, range, default and meaning.

A new setting is one field with its docstring. `MAY_CHANGE` marks what another start of the same run may set anew; everything
else decides the result (the world size is not a setting).
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from simclr_dist.config.ranges import (
    MAY_CHANGE,
    Bounds,
    Channels,
    Count,
    Minutes,
    Natural,
    NonNegative,
    Positive,
    Probability,
    Range,
    Workers,
)

Encoder = Literal["resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
Stem = Literal["imagenet", "small", "small_stride2"]
Width = Annotated[int, Range(least=1, largest=2**20)]
Beta = Annotated[float, Range(least=0, below=1)]
Centre = Annotated[float, Range(least=-1000, most=1000)]
ENCODERS: tuple[str, ...] = get_args(Encoder)
STEMS: tuple[str, ...] = get_args(Stem)


@dataclass(frozen=True)
class DataConfig:
    """Source of the images, and their reader."""

    shards: Annotated[str, MAY_CHANGE] = ""
    """Training shards: a folder with its manifest, the URL of one, or tars like shards/train-{000000..000099}.tar."""
    reader: Literal["manifest", "stream"] = "manifest"
    """`stream` reads tars without a manifest: no exact epochs, and no resume in the middle of one."""
    channels: Channels = 3
    """Channels of every image: 1 is gray, 3 RGB; as the shards were made."""
    bit_depth: Literal[8, 16] = 8
    """Bits of a channel; as the shards were made."""
    workers: Annotated[Workers, MAY_CHANGE] = 2
    """Reading processes beside each rank; 0 reads in the rank itself."""
    window: Count = 16
    """Shards that are mixed with each other by the shuffle, and kept open by a reader."""
    on_bad_sample: Literal["error", "replace"] = "error"
    """At an unreadable image: end the run, or take a spare image of the same epoch."""
    max_bad_samples: Annotated[Natural, MAY_CHANGE] = 100
    """With `replace`: more different bad images than this end the run."""
    in_memory: Annotated[Literal["auto", "always", "never"], MAY_CHANGE] = "auto"
    """Decode all images once and hold them in each rank's memory, shared with its workers; auto: up to 1 GiB of pixels."""
    cache: Annotated[str, MAY_CHANGE] = ""
    """Folder for remote shards, on a local disk; default: $SIMCLR_DIST_CACHE, else ~/.cache/simclr_dist/shards."""
    cache_gib: Annotated[float | None, Range(above=0, most=1_000_000_000), MAY_CHANGE] = None
    """Most that the cache holds, in GiB; default: $SIMCLR_DIST_CACHE_GIB, else 100."""
    retry_minutes: Annotated[Minutes, MAY_CHANGE] = 3.0
    """How long a failing server is tried again before the run ends."""
    samples: Count | None = None
    """With `reader: stream`: how many images the tars hold in all, which is the length of an epoch."""
    shuffle_buffer: Count = 1000
    """With `reader: stream`: encoded images that each worker holds and mixes."""
    allow_pipe: Annotated[bool, MAY_CHANGE] = False
    """With `reader: stream`: let shards be `pipe:` commands, which a shell runs; on the command line alone."""

    @property
    def kind(self) -> tuple[int, int]:
        """Return the arguments of `data.pixels.kinds.Kind`."""
        return self.channels, self.bit_depth


@dataclass(frozen=True)
class ViewsConfig:
    """The two random views of an image; the preset gives the rest."""

    preset: Literal["imagenet", "small", "blog"] = "imagenet"
    """Named strengths: the paper's for ImageNet, the paper's for small images, the introductory blog's."""
    image_size: Annotated[int | None, Range(least=8, largest=2**15)] = None
    """Side of a view in pixels."""
    crop_scale: Annotated[tuple[float, float] | None, Bounds(most=1)] = None
    """Smallest and largest part of the image's area that a crop takes."""
    crop_ratio: Annotated[tuple[float, float] | None, Bounds()] = None
    """Smallest and largest width / height of a crop before it is resized."""
    interpolation: Literal["bicubic", "bilinear"] | None = None
    """How a crop is resized (always antialiased)."""
    flip: Probability | None = None
    """Probability of a horizontal flip."""
    vertical_flip: Probability | None = None
    """Probability of a vertical flip (no preset has one)."""
    rotate: Probability | None = None
    """Probability of one to three quarter turns (no preset has them)."""
    jitter: Probability | None = None
    """Probability of colour jitter."""
    brightness: NonNegative | None = None
    """Strength of brightness jitter."""
    contrast: NonNegative | None = None
    """Strength of contrast jitter."""
    saturation: NonNegative | None = None
    """Strength of saturation jitter."""
    hue: Annotated[float | None, Range(least=0, most=0.5)] = None
    """Strength of hue jitter, at most 0.5."""
    gray: Probability | None = None
    """Probability that a view loses its colour."""
    blur: Probability | None = None
    """Probability of Gaussian blur."""
    blur_sigma: Annotated[tuple[float, float] | None, Bounds()] = None
    """Smallest and largest standard deviation of the blur, in pixels."""
    solarize: Probability | None = None
    """Probability that all above the middle of the scale is inverted (no preset does)."""
    mean: tuple[Centre, ...] | None = None
    """Mean of each channel on the scale 0-1; `simclr-dist shard --statistics SHARDS` measures it."""
    std: tuple[Positive, ...] | None = None
    """Standard deviation of each channel on the scale 0-1; measured with the mean."""


@dataclass(frozen=True)
class ModelConfig:
    """Encoder and projector."""

    encoder: str = "resnet50"
    """`resnet18` to `resnet152`, `resnet10` (small, for CPUs), `timm/NAME` or `torchvision/NAME`."""
    width: Literal[1, 2, 4] = 1
    """Multiplies every width of the encoder, as in the paper's 2x and 4x."""
    stem: Stem = "imagenet"
    """First layers: 7x7 stride 2 with max-pool; 3x3 for 32-pixel images; 3x3 with stride 2, four times cheaper."""
    drop_path: Annotated[float | None, Range(least=0, below=1)] = None
    """Rate of drop path (stochastic depth) in the last block of a timm or torchvision network; default: its own."""
    init: Literal["random", "imagenet", "imagenet_or_random", "file"] = "random"
    """Start weights; `imagenet` are torchvision's supervised ones (downloaded)."""
    init_file: str = ""
    """With `init: file`: weights of ours or of another program (.safetensors, or a file of torch.save)."""
    init_prefix: str = ""
    """With `init: file`: what the encoder's names begin with, where the file holds several."""
    init_except: str = ""
    """With `init: file`: parts of the encoder that stay random, with commas between (conv1,bn1)."""
    projector_depth: Annotated[int, Range(least=0, largest=1000)] = 2
    """Linear layers of the projector; 0 is none."""
    projector_hidden: Width = 2048
    """Width of the projector's inner layers."""
    projector_dim: Width = 128
    """Size of the embedding z."""
    projector_batch_norm: bool = True
    """BatchNorm after each layer of the projector."""

    @property
    def shape(self) -> dict[str, Any]:
        """Return the arguments of `method.encoders.build_simclr`."""
        return {key: value for key, value in dataclasses.asdict(self).items() if not key.startswith("init")}


@dataclass(frozen=True)
class LossConfig:
    """NT-Xent."""

    temperature: Positive = 0.1
    """Divides the cosine similarities; the paper's best: 0.1 on ImageNet, 0.5 on CIFAR-10."""
    decoupled: bool = False
    """Leave the positive out of the denominator (decoupled contrastive learning, DCL)."""
    scale: Positive = 1.0
    """Multiplies the loss; 2 gives that of SimCLR's official code, which adds the means over the two views."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning rate."""

    name: str = "lars"
    """`lars`, `muon`, `sgd`, `adamw`, or `torch_optimizer.NAME` for one of torch-optimizer's."""
    base_lr: NonNegative = 0.3
    """Learning rate before the rule below."""
    lr_rule: Literal["linear", "sqrt", "constant"] = "linear"
    """Peak rate: base_lr * global_batch_size/256, base_lr * sqrt(global_batch_size), or base_lr."""
    weight_decay: NonNegative = 1e-6
    """Weight decay of the weights of linear layers and convolutions (never of norms, biases, positions and tokens)."""
    momentum: Annotated[float, Range(least=0, below=1)] = 0.9
    """Momentum of lars, muon and sgd."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Averaging of adamw's gradient and of its square (of muon's, for what is no weight); large batches want 0.95 there."""
    trust_coefficient: NonNegative = 0.001
    """LARS's eta."""
    warmup_epochs: NonNegative = 10.0
    """Linear warm-up in epochs; ignored only when warmup_steps is set, which then decides."""
    warmup_steps: Natural | None = None
    """Linear warm-up in steps, instead of epochs."""
    clip_norm: NonNegative = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Files that are kept on disk, in steps."""

    every: Annotated[Count, MAY_CHANGE] = 500
    """Steps between full checkpoints (one more at the end)."""
    keep_last: Annotated[Count, MAY_CHANGE] = 3
    """Newest checkpoints that are kept."""
    keep_every: Annotated[Natural, MAY_CHANGE] = 0
    """Also keep each checkpoint whose step is a multiple of this; 0 keeps none."""
    export_every: Annotated[Natural, MAY_CHANGE] = 0
    """Steps between exported encoders (one more at the end); 0 exports at the end alone."""


@dataclass(frozen=True)
class LogConfig:
    """Output of the run, in steps."""

    every: Annotated[Count, MAY_CHANGE] = 10
    """Steps between lines of the log, of metrics.jsonl and of TensorBoard."""
    tensorboard: Annotated[bool, MAY_CHANGE] = True
    """Write TensorBoard events into the run folder."""
    wandb: Annotated[bool, MAY_CHANGE] = False
    """Send metrics to Weights & Biases, too: into RUN/wandb, or with WANDB_MODE=online to its server."""
    mlflow: Annotated[bool, MAY_CHANGE] = False
    """Send metrics to MLflow, too: into RUN/mlflow.db, or to $MLFLOW_TRACKING_URI."""
    trackio: Annotated[bool, MAY_CHANGE] = False
    """Send metrics to Trackio, too: into RUN/trackio, or to $TRACKIO_SPACE_ID or $TRACKIO_SERVER_URL."""
    views_every_epochs: Annotated[Natural, MAY_CHANGE] = 10
    """Epochs between pictures of views in TensorBoard, beside those of the first step; 0 shows those alone."""


@dataclass(frozen=True)
class ProbeConfig:
    """kNN on labelled images while the run goes on. Watched, never used to select."""

    every_epochs: Annotated[Natural, MAY_CHANGE] = 0
    """Epochs between two probes; 0 is none."""
    shards: Annotated[str, MAY_CHANGE] = ""
    """Folder of labelled shards that the run does not train on."""
    images: Annotated[int, Range(least=4), MAY_CHANGE] = 2000
    """How many of them, at most: one half votes on the other."""


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    run_folder: Annotated[str, MAY_CHANGE] = ""
    """Run folder: resumed when it holds this run, refused when it holds another."""
    seed: Annotated[int, Range(least=0, below=2**64)] = 0
    """Decides start weights, order and views."""
    global_batch_size: Annotated[int, Range(least=2)] = 4096
    """Images a step over all ranks: each anchor has 2 * (global_batch_size - 1) negatives."""
    micro_batches: Count = 1
    """Micro-batches that the global batch is cut into; the BatchNorm group is one of them over all ranks."""
    epochs: Annotated[Positive | None, MAY_CHANGE] = None
    """Length of the run in epochs; set this or steps."""
    steps: Annotated[Count | None, MAY_CHANGE] = None
    """Length of the run in steps; set this or epochs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model lives; auto takes CUDA when there is a GPU."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """Encoder arithmetic: fp32, bf16 autocast, fp16 autocast with loss scaling, or fp64 (to prove things)."""
    activation_checkpointing: bool = False
    """Keep only each residual block's input and compute the rest again in the backward: less memory, more time."""
    channels_last: bool = True
    """Memory order of images and weights; pays on GPUs and CPUs."""
    compile: bool = False
    """torch.compile the encoder, and colour views by C++ where they are coloured on CPUs; there it needs g++, or CXX."""
    deterministic: Literal[False, True, "exact"] = False
    """true: CUDA's repeatable kernels, gradients summed in rank order; exact: the same bits at any number of ranks."""
    exact_piece: Count = 32
    """Images that `deterministic: exact` computes at a time; each rank has a whole number of pieces of a micro-batch."""
    max_skipped_steps: Annotated[Count, MAY_CHANGE] = 10
    """Non-finite steps in a row (each skipped) that end the run as diverged."""
    check_ranks_every: Annotated[Natural, MAY_CHANGE] = 100
    """Steps between checks that all ranks hold the same bits; 0: only before each checkpoint."""
    timeout_minutes: Annotated[Minutes, MAY_CHANGE] = 5.0
    """How long a rank waits for the others in a collective, or for a worker: then a machine, or a worker, is lost."""
    first_step_timeout_minutes: Annotated[Minutes, MAY_CHANGE] = 30.0
    """The same until the first step is done: start-up, data and compilation take longer on some ranks."""
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)

    @property
    def peak_lr(self) -> float:
        """Return the rate after warm-up, by the GLOBAL batch (paper, appendix B.1)."""
        scale = {"linear": self.global_batch_size / 256, "sqrt": math.sqrt(self.global_batch_size), "constant": 1.0}
        return self.optim.base_lr * scale[self.optim.lr_rule]

    @property
    def number_bytes(self) -> int:
        """Return the bytes of a weight, gradient, or number of z."""
        return 8 if self.precision == "fp64" else 4

    @property
    def piece(self) -> int:
        """Return the images whose multiple each rank has of a micro-batch."""
        return self.exact_piece if self.deterministic == "exact" else 1

    def steps_per_epoch(self, samples: int) -> int:
        """Count the whole global batches in `samples` images."""
        return samples // self.global_batch_size

    def total_steps(self, samples: int) -> int:
        """Return the length of the run in steps."""
        return self.steps if self.steps is not None else round((self.epochs or 0) * self.steps_per_epoch(samples))

    def warmup_steps(self, samples: int) -> int:
        """Return the length of the warm-up in steps."""
        if self.optim.warmup_steps is not None:
            return self.optim.warmup_steps
        return round(self.optim.warmup_epochs * self.steps_per_epoch(samples))

    def files_kept(self, total: int) -> tuple[int, int]:
        """Return how many checkpoints and encoders a run of `total` steps keeps.

        The checkpoints are those that lie there at a time, at most. One that is being written counts: an older one goes later.
        """
        keep, saves = self.checkpoint, -(-total // self.checkpoint.every)
        older = max(0, saves - keep.keep_last - 1) * keep.every  # newest step that keep_last leaves to keep_every
        kept = older // math.lcm(keep.every, keep.keep_every) if keep.keep_every else 0
        return min(saves, keep.keep_last + 1) + kept, -(-total // keep.export_every) if keep.export_every else 1

    def to_dict(self) -> dict[str, Any]:
        """Return a plain nested dict, as config.yaml and a checkpoint hold it."""
        return dataclasses.asdict(self)
