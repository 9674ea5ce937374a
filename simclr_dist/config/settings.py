"""What a config consists of: every setting with its type, its default and its meaning, and the numbers that follow from them.

Which values go, alone and together, is for `config_checks`; `config` reads and compares them.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

ENCODERS = ("resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and who reads them."""

    shards: str = ""
    """Training shards: a folder with its manifest, the URL of one, or tars like shards/train-{000000..000099}.tar."""
    reader: Literal["manifest", "stream"] = "manifest"
    """`stream` reads tars without a manifest: no exact epochs, and no resume in the middle of one."""
    workers: int = 2
    """Reading processes beside each rank; 0 reads in the rank itself."""
    window: int = 16
    """Shards that are mixed with each other by the shuffle, and kept open by a reader."""
    on_bad_sample: Literal["error", "replace"] = "error"
    """What an unreadable image does: end the run, or give its place to a spare of the same epoch."""
    max_bad_samples: int = 100
    """With `replace`: more different bad images than this end the run all the same."""
    in_memory: Literal["auto", "always", "never"] = "auto"
    """Decode all images once and hold them in each rank's memory, shared with its workers; auto: up to 1 GiB of pixels."""
    cache: str = ""
    """Folder for remote shards, on a local disk; default: $SIMCLR_DIST_CACHE, else ~/.cache/simclr_dist/shards."""
    cache_gib: float | None = None
    """Most that the cache holds, in GiB; default: $SIMCLR_DIST_CACHE_GIB, else 100."""
    retry_minutes: float = 3.0
    """How long a server that fails is asked again before the run ends."""
    samples: int | None = None
    """With `reader: stream`: how many images the tars hold in all, which is the length of an epoch."""
    shuffle_buffer: int = 1000
    """With `reader: stream`: encoded images that each worker holds and mixes."""
    allow_pipe: bool = False
    """With `reader: stream`: let shards be `pipe:` commands, which a shell runs."""


@dataclass(frozen=True)
class ViewsConfig:
    """The two random views of an image; what is not set comes from the preset."""

    preset: Literal["imagenet", "small", "blog"] = "imagenet"
    """Named strengths: the paper's for ImageNet, the paper's for small images, the introductory blog's."""
    image_size: int | None = None
    """Side of a view in pixels."""
    crop_scale: tuple[float, float] | None = None
    """Smallest and largest part of the image's area that a crop takes."""
    crop_ratio: tuple[float, float] | None = None
    """Smallest and largest width / height of a crop before it is resized."""
    interpolation: Literal["bicubic", "bilinear"] | None = None
    """How a crop is resized (always antialiased)."""
    flip: float | None = None
    """Probability of a horizontal flip."""
    jitter: float | None = None
    """Probability of colour jitter."""
    brightness: float | None = None
    """Strength of brightness jitter."""
    contrast: float | None = None
    """Strength of contrast jitter."""
    saturation: float | None = None
    """Strength of saturation jitter."""
    hue: float | None = None
    """Strength of hue jitter, at most 0.5."""
    gray: float | None = None
    """Probability that a view loses its colour."""
    blur: float | None = None
    """Probability of Gaussian blur."""
    blur_sigma: tuple[float, float] | None = None
    """Smallest and largest standard deviation of the blur, in pixels."""
    mean: tuple[float, float, float] | None = None
    """Mean of red, green and blue on the scale 0-1."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of red, green and blue on the scale 0-1."""


@dataclass(frozen=True)
class ModelConfig:
    """Encoder and projector."""

    encoder: Literal["resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = "resnet50"
    """Architecture; resnet10 is a small one for CPUs (base width 16), the others are torchvision's."""
    width: Literal[1, 2, 4] = 1
    """Multiplies every width of the encoder, as in the paper's 2x and 4x."""
    stem: Literal["imagenet", "small", "small_stride2"] = "imagenet"
    """First layers: 7x7 stride 2 with max-pool; 3x3 for 32-pixel images; 3x3 with stride 2, four times cheaper."""
    init: Literal["random", "imagenet", "imagenet_or_random", "file"] = "random"
    """Start weights; `imagenet` are torchvision's supervised ones (downloaded)."""
    init_file: str = ""
    """With `init: file`: an encoder of ours (.safetensors)."""
    projector_depth: int = 2
    """Linear layers of the projector; 0 is none."""
    projector_hidden: int = 2048
    """Width of the projector's inner layers."""
    projector_dim: int = 128
    """Size of the embedding z."""
    projector_batch_norm: bool = True
    """BatchNorm after each layer of the projector."""

    @property
    def shape(self) -> dict[str, Any]:
        """The arguments of `model.build_simclr`."""
        return {key: value for key, value in dataclasses.asdict(self).items() if not key.startswith("init")}


@dataclass(frozen=True)
class LossConfig:
    """NT-Xent."""

    temperature: float = 0.1
    """Divides the cosine similarities; the paper's best: 0.1 on ImageNet, 0.5 on CIFAR-10."""
    decoupled: bool = False
    """Leave the positive out of the denominator (decoupled contrastive learning, DCL)."""
    scale: float = 1.0
    """Multiplies the loss; 2 gives that of SimCLR's official code, which adds the means over the two views."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning rate."""

    name: str = "lars"
    """`lars`, `sgd`, `adamw`, or `torch_optimizer.NAME` for one of torch-optimizer's."""
    base_lr: float = 0.3
    """Learning rate before the rule below."""
    lr_rule: Literal["linear", "sqrt", "constant"] = "linear"
    """Peak rate: base_lr * global_batch_size/256, base_lr * sqrt(global_batch_size), or base_lr."""
    weight_decay: float = 1e-6
    """L2 weight decay of weights (never of BatchNorm parameters and biases)."""
    momentum: float = 0.9
    """Momentum of lars and sgd."""
    trust_coefficient: float = 0.001
    """LARS's eta."""
    warmup_epochs: float = 10.0
    """Linear warm-up in epochs; ignored only when warmup_steps is set, which then decides."""
    warmup_steps: int | None = None
    """Linear warm-up in steps, instead of epochs."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept on disk, in steps."""

    every: int = 500
    """Steps between full checkpoints (one more at the end)."""
    keep_last: int = 3
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Also keep each checkpoint whose step is a multiple of this; 0 keeps none."""
    export_every: int = 0
    """Steps between exported encoders (one more at the end); 0 exports at the end alone."""


@dataclass(frozen=True)
class LogConfig:
    """What is shown, in steps."""

    every: int = 10
    """Steps between lines of the log, of metrics.jsonl and of TensorBoard."""
    tensorboard: bool = True
    """Write TensorBoard events into the run folder."""
    views_every_epochs: int = 10
    """Epochs between pictures of views in TensorBoard, beside those of the first step; 0 shows those alone."""


@dataclass(frozen=True)
class ProbeConfig:
    """kNN on labelled images while the run goes on: watched, never used to select."""

    every_epochs: int = 0
    """Epochs between two probes; 0 is none."""
    shards: str = ""
    """Folder of labelled shards that the run does not train on."""
    images: int = 2000
    """How many of them, at most: one half votes on the other."""


@dataclass(frozen=True)
class Config:
    """A run."""

    run_folder: str = ""
    """Run folder: resumed when it holds this run, refused when it holds another."""
    seed: int = 0
    """Decides start weights, order and views."""
    global_batch_size: int = 4096
    """Images a step over all ranks: each anchor has 2 * (global_batch_size - 1) negatives."""
    micro_batches: int = 1
    """Pieces that the global batch goes through the encoder in; the BatchNorm group is one piece over all ranks."""
    epochs: float | None = None
    """Length of the run in epochs; set this or steps."""
    steps: int | None = None
    """Length of the run in steps; set this or epochs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model lives; auto takes CUDA when there is a GPU."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """Encoder arithmetic: fp32, bf16 autocast, fp16 autocast with loss scaling, or fp64 (to prove things)."""
    activation_checkpointing: bool = False
    """Keep each residual block's input alone and compute the rest again in the backward: less memory, more time."""
    channels_last: bool = True
    """Memory order of images and weights; pays on GPUs and CPUs."""
    compile: bool = False
    """torch.compile the encoder."""
    deterministic: bool = False
    """CUDA: only deterministic kernels, and gradients summed in rank order; slower."""
    max_skipped_steps: int = 10
    """Non-finite steps in a row (each skipped) that end the run as diverged."""
    check_ranks_every: int = 100
    """Steps between checks that all ranks hold the same bits (one more before each checkpoint); 0 leaves the others out."""
    timeout_minutes: float = 5.0
    """How long a rank waits for the others in a collective: a lost machine is noticed so late."""
    first_step_timeout_minutes: float = 30.0
    """The same until the first step is done: start-up, data and compilation take each rank a different time."""
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
        """Learning rate at the end of warm-up, from the rule on the GLOBAL batch (paper, appendix B.1)."""
        scale = {"linear": self.global_batch_size / 256, "sqrt": math.sqrt(self.global_batch_size), "constant": 1.0}
        return self.optim.base_lr * scale[self.optim.lr_rule]

    def steps_per_epoch(self, samples: int) -> int:
        """Whole global batches in `samples` images."""
        return samples // self.global_batch_size

    def total_steps(self, samples: int) -> int:
        """Length of the run in steps."""
        return self.steps if self.steps is not None else round((self.epochs or 0) * self.steps_per_epoch(samples))

    def warmup_steps(self, samples: int) -> int:
        """Length of the warm-up in steps."""
        if self.optim.warmup_steps is not None:
            return self.optim.warmup_steps
        return round(self.optim.warmup_epochs * self.steps_per_epoch(samples))

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict: what config.yaml and a checkpoint hold."""
        return dataclasses.asdict(self)
