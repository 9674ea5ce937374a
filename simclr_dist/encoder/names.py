"""Name a run's encoders and results, and a published checkpoint. It needs no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from simclr_dist.config.networks import unknown_encoder
from simclr_dist.config.ranges import Positive, Range, check_ranges
from simclr_dist.config.settings import ENCODERS, Stem
from simclr_dist.run.steps import step_name
from simclr_dist.system.errors import ConfigError, DataError, shown

# For people.
PATTERN = "RUN/encoders/step-XXXXXXXX.safetensors"
RESULT_PATTERN = "RUN/eval/step-XXXXXXXX.json"
_ENCODERS = "encoders"


@dataclass(frozen=True)
class Foreign:
    """A checkpoint of another program. Raises ConfigError for a value out of its range."""

    arch: str
    """With --weights, in place of ENCODER: the architecture, as of model.encoder (resnet50, timm/NAME, torchvision/NAME)."""
    weights: str
    """With --arch: a published checkpoint, of torchvision, timm and others."""
    image_size: Annotated[int, Range(least=8, most=4096)] = 224
    """With --weights: side of the images in pixels."""
    width: Literal[1, 2, 4] = 1
    """With --weights: multiplies every width of the encoder."""
    stem: Stem = "imagenet"
    """With --weights: first layers of the encoder."""
    channels: Annotated[int, Range(least=1, most=1024)] = 3
    """With --weights: channels of the images."""
    prefix: str | None = None
    """With --weights: what the encoder's names begin with, where the file holds several."""
    mean: tuple[float, ...] | None = None
    """With --weights: of the images' channels, like 0.5/0.5/0.5 (default: ImageNet's)."""
    std: tuple[Positive, ...] | None = None
    """With --weights: deviation of the images' channels (default: ImageNet's)."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if reason := unknown_encoder(self.arch):
            raise ConfigError(f"arch: {shown(self.arch)} {reason}")
        for name in ("width", "stem") if self.arch not in ENCODERS else ():
            if (value := getattr(self, name)) != getattr(Foreign, name):
                raise ConfigError(f"{name}: {value}: has no effect on {self.arch}; leave it out")


def encoder_path(run: str | Path, step: int) -> Path:
    """Return the file of a run's encoder after `step`."""
    return Path(run) / _ENCODERS / step_name(step, ".safetensors")


def encoders(run: str | Path) -> list[Path]:
    """List a run's encoders that are whole, the first step first."""
    return sorted((Path(run) / _ENCODERS).glob("step-*.safetensors"))


def newest_encoder(run: str | Path) -> Path | None:
    """Return a run's whole encoder of the highest step. Returns None where it has none."""
    return max(encoders(run), default=None)


def encoder_of(typed: str) -> str:
    """Return the newest encoder of a run folder. Any other path is returned as it is."""
    return str(newest_encoder(typed) or typed)


def result_path(encoder: str | Path, out: str | Path | None = None, layer: str = "h", *, several: bool = False) -> Path:
    """Return the result's file: `out`, else RUN/eval/NAME.json for RUN/encoders/NAME.safetensors.

    Beside an encoder in no run folder it is NAME.eval.json, as NAME.json is its card. Layers other than h follow NAME. The
    comparison of `several` encoders lies beside the first one's, and ends in .rivals.json.
    """
    if out is not None:
        return Path(out)
    if several:
        return (path := result_path(encoder, layer=layer)).with_name(f"{path.stem}.rivals.json")
    encoder, of_layer = Path(encoder), "" if layer == "h" else f".{layer}"
    if len(encoder.parts) == 1:
        encoder = encoder.absolute()  # inside the folder of encoders, its name is not part of what was typed
    if encoder.parent.name == _ENCODERS:
        return encoder.parent.parent / "eval" / f"{encoder.stem}{of_layer}.json"
    return encoder.with_name(f"{encoder.stem}{of_layer}.eval.json")


def run_of_result(result: Path) -> Path | None:
    """Return the run whose folder of results `result` is in. Returns None for a result elsewhere."""
    folder = result.absolute().parent
    return folder.parent if folder.name == "eval" and (folder.parent / _ENCODERS).is_dir() else None


def check_is_file(encoder: str | Path) -> None:
    """Raise DataError where there is no file. It names the newest encoder of the path's run."""
    path = Path(encoder)
    if path.is_file():
        return
    what = "a folder, not an encoder" if path.is_dir() else "no such file"
    marks = ("checkpoints", _ENCODERS)
    run = next((one for one in (path, *path.parents[:2]) if any((one / mark).is_dir() for mark in marks)), None)
    if run is None:
        raise DataError(f"{path}: {what}; name an encoder of a run, {PATTERN}")
    if newest := newest_encoder(run):
        raise DataError(f"{path}: {what}; the newest of this run is {newest}")
    raise DataError(
        f"{path}: {what}; the run {run} has none yet: it exports one at its end, and every checkpoint.export_every steps"
        f" where that is set; `simclr-dist eval --watch {run}` evaluates each as it comes"
    )
