"""Export an encoder as one ONNX file. First ONNX Runtime must give what torch gives."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from simclr_dist.encoder.file import load_encoder
from simclr_dist.system.errors import ConfigError, DataError, refusing
from simclr_dist.system.files import write_atomically

TOLERANCE = 1e-4  # of the largest |h|; float32 sums in another order differ by some 1e-6

_NEEDED = ("onnx", "onnxruntime", "onnxscript")
CURE = f"pip install {' '.join(_NEEDED)}"  # for a clone and an installed package alike
_MOST = 2**31 - 2**20  # bytes of weights: protobuf ends at 2 GiB, and the graph takes some


def export_onnx(encoder_path: str | Path, out_path: str | Path, layer: str = "h") -> float:
    """Write an exported encoder as ONNX. Returns its largest difference from torch, relative to the largest |h|.

    Input "images": float32 [n, c, s, s], any n, as `encoder.preprocess` makes them; c and s are the card's "channels" and
    "image_size". Output: float32 [n, card["feature_size"]], named "h" whatever the `layer` (as of `load_encoder`). The card is
    in the file's metadata under "card", as JSON, without the run's config. The same encoder and versions give the same bytes
    in every folder.
    ONNX Runtime and torch see the same noise images, in batches of 1 and 3, before the file is written.

    Raises ConfigError for a name that does not end in .onnx and where a package is not installed; DataError for what is not
    our encoder, a model above ONNX's 2 GiB, outputs that differ by more than TOLERANCE, and a file that cannot be written.
    """
    out = Path(out_path)
    if out.suffix != ".onnx":
        raise ConfigError(f"export: {str(out_path)!r} must end in .onnx")
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"export: ONNX needs {', '.join(missing)}; {CURE}")
    encoder = load_encoder(encoder_path, layer=layer)
    card = encoder.card
    assert isinstance(card, dict)
    if (size := sum(tensor.nbytes for tensor in encoder.state_dict().values())) > _MOST:
        raise DataError(f"{encoder_path}: {size / 2**30:.1f} GiB of weights; an ONNX file holds at most 2 GiB")
    image = card["preprocess"]["input_size"]
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["h"]}
    shapes, example = ({0: torch.export.Dim("n", min=1)},), (torch.zeros(2, *image),)
    program = torch.onnx.export(encoder, example, dynamo=True, verbose=False, dynamic_shapes=shapes, **names)
    assert program is not None
    model = program.model_proto
    _clear(model)
    model.producer_version = torch.__version__.partition("+")[0]  # the same for every build of it
    # The config holds paths of the machine that trained.
    public = {key: value for key, value in card.items() if key != "config"}
    model.metadata_props.add(key="card", value=json.dumps(public, sort_keys=True))
    content = model.SerializeToString(deterministic=True)
    difference = _difference(encoder, content, image)
    if not difference <= TOLERANCE:
        raise DataError(f"{encoder_path}: ONNX Runtime's output differs from torch's by {difference:.1e}; nothing was written")
    with refusing(f"{out}: cannot be written"):
        write_atomically(out, content)
    return difference


def _clear(message: Any) -> None:
    """Clear what no runtime reads. It has this machine's paths and lines of source."""
    for name in {"doc_string", "metadata_props"} & set(message.DESCRIPTOR.fields_by_name):
        message.ClearField(name)
    for field, value in message.ListFields():
        if field.message_type:
            for part in [value] if hasattr(value, "ListFields") else value:
                _clear(part)


def _difference(encoder: torch.nn.Module, content: bytes, image: list[int]) -> float:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors; without it, hints on standard error
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    differences = []
    for count in (1, 3):
        images = torch.randn(count, *image, generator=generator)
        with torch.inference_mode():
            h = encoder(images)
        (output,) = session.run(None, {"images": images.numpy()})
        differences.append(float((torch.from_numpy(output) - h).abs().max() / h.abs().max().clamp_min(1e-30)))
    return max(differences)
