"""Name the networks that `model.encoder` may be. The libraries' names are read from their source, without an import."""

import functools
import importlib.util
import re
from pathlib import Path

from simclr_dist.config.settings import ENCODERS
from simclr_dist.config.strict_yaml import suggest

LIBRARIES = ("timm", "torchvision")

_REGISTERED = re.compile(r"^@register_model(?:\(\))?\n(?:(?!def )[^\n]*\n)*def (\w+)\(", re.MULTILINE)


@functools.cache
def names_of(library: str) -> tuple[str, ...]:
    """List a library's networks; () where it is not installed."""
    spec = importlib.util.find_spec(library)
    files = sorted(Path(spec.origin).parent.glob("models/*.py")) if spec and spec.origin else []
    return tuple(sorted({name for file in files for name in _REGISTERED.findall(file.read_text(encoding="utf-8"))}))


def encoder_names() -> tuple[str, ...]:
    """List what `model.encoder` may be here."""
    return (*ENCODERS, *(f"{library}/{name}" for library in LIBRARIES for name in names_of(library)))


def titled(name: str, width: int) -> str:
    """Name a network for people. Only those of ours have a width."""
    return f"{name}, width {width}" if name in ENCODERS else name


def unknown_encoder(name: str) -> str | None:
    """Say why a name is no encoder; None for one that is. A name of timm's may have a tag, as in `timm/resnet18.a1_in1k`."""
    library, slash, network = name.partition("/")
    if not slash or library not in LIBRARIES:
        allowed = f"{', '.join(ENCODERS)}, timm/NAME and torchvision/NAME"
        return None if name in ENCODERS else f"is not one of {allowed}{suggest(name, ENCODERS)}"
    if not (known_names := names_of(library)):
        return f"needs {library}, which is not installed: pip install timm"
    network = network.partition(".")[0] if library == "timm" else network
    if network in known_names:
        return None
    near = suggest(network, known_names).replace("mean '", f"mean '{library}/")
    return f"is not a network of {library}{near}"
