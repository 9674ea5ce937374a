"""Run the verb `export`: write an encoder for other programs. Or take one out of a checkpoint."""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from simclr_dist.encoder.names import PATTERN, check_is_file, encoder_path, newest_encoder
from simclr_dist.run.commands import evaluate, printed
from simclr_dist.run.folder import newest_step, stored_config
from simclr_dist.run.steps import step_name, step_of
from simclr_dist.system import signals
from simclr_dist.system.errors import ConfigError, refusing
from simclr_dist.system.files import write_atomically

HELP = "write an encoder as ONNX or as a folder for a model hub, or out of a checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `simclr-dist export`."""
    add = parser.add_argument
    add("encoder", metavar="ENCODER", help=f"{PATTERN}; or RUN, which is its last saved step; or a checkpoint of it")
    what = "OUT.onnx; OUT.safetensors, an encoder; or a new folder, with weights, a model card (README.md) and results"
    add("out", metavar="OUT", nargs="?", help=f"{what} (default, of a run: {PATTERN})")
    add("--layer", default="h", help="what comes out of the ONNX file: h, z, or projector.N (default: %(default)s)")
    add("--license", default="", metavar="ID", help="licence of the folder, for its card: apache-2.0, cc-by-nc-4.0, other")


def run(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """Export an encoder; return the exit code. Print how far ONNX Runtime is from torch. Raises UserError."""
    source = _saved(Path(arguments.encoder))
    out = arguments.out or str(_place_in_run(source))
    ending, files = Path(out).suffix, (".onnx", ".safetensors")
    if ending[1:].isalpha() and ending not in files and not out.endswith("/"):  # a folder may be called v1.2
        raise ConfigError(f"export: {out!r} must end in .onnx or .safetensors, or in / for a folder")
    if ending in files and arguments.license:
        raise ConfigError(f"--license: {arguments.license!r}: has no effect on a {ending} file; leave it out")
    if ending != ".onnx" and arguments.layer != "h":
        raise ConfigError(f"--layer: {arguments.layer!r}: has an effect on an .onnx file alone; leave it out")
    with signals.blocked(), signals.uncollected():  # torch's import passes over what a signal raises
        from simclr_dist.encoder.file import load_encoder
        from simclr_dist.encoder.onnx import export_onnx
        from simclr_dist.evaluate.publish import publish
        from simclr_dist.train.state import export_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        if source.suffix == ".pt":
            source = export_checkpoint(source, Path(folder, f"{source.stem}.safetensors"))
        if ending == ".safetensors":
            load_encoder(source)  # nothing else is copied
            print(f"{_copied(source, Path(out))}: {out}{printed(evaluate(out, stored_config(Path(arguments.encoder))))}")
        elif ending == ".onnx":
            difference = export_onnx(source, out, arguments.layer)
            print(f"written: {out}; ONNX Runtime's output differs from torch's by {difference:.1e} of the largest")
        else:
            measured = publish(source, out, arguments.license)
            hint = "" if measured else "; no results are in its card: `simclr-dist eval` this encoder, and export it anew"
            print(f"written: {out}{hint}")
    return 0


def _copied(source: Path, out: Path) -> str:
    """Copy an encoder with its card and projector; return what was done. Raises ConfigError where other files are there."""
    with refusing(f"{out}: cannot be written"):
        files = [(out.with_suffix(suffix), source.with_suffix(suffix)) for suffix in (".safetensors", ".projector", ".json")]
        contents = {path: file.read_bytes() for path, file in files if file.exists()}
        for path, content in contents.items():
            if path.exists() and path.read_bytes() != content:
                raise ConfigError(f"export: {str(path)!r} is there already, with other content; name a new file")
        if out.exists():
            return "there already"
        out.parent.mkdir(parents=True, exist_ok=True)
        for path, content in reversed(contents.items()):  # the encoder last: where it is, the others are
            write_atomically(path, content)
    return "written"


def _place_in_run(source: Path) -> Path:
    """Return where a run has the encoder of its file `source`. Raises ConfigError for one that is in no run."""
    path = source if len(source.parts) > 1 else source.absolute()
    if (step := step_of(path)) is None or path.parent.name not in ("encoders", "checkpoints"):
        raise ConfigError(f"export: {str(source)!r} is in no run folder; name OUT")
    return encoder_path(path.parent.parent, step)


def _saved(path: Path) -> Path:
    """Return the file of a run's last step on disk. Any other path is returned as it is."""
    encoder, step = newest_encoder(path), newest_step(path)
    if step > (step_of(encoder) or 0 if encoder else 0):
        return path / "checkpoints" / step_name(step, ".pt")
    check_is_file(encoder or path)
    return encoder or path
