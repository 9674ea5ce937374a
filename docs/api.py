"""The API reference from the docstrings, as HTML: `make api`, then open build/api/index.html."""

import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc

import simclr_dist


def main(into: Path) -> None:
    """Write the pages into the folder `into`."""
    for name in simclr_dist.__all__:  # they come when they are asked for, and pdoc does not ask
        setattr(simclr_dist, name, getattr(simclr_dist, name))
    warnings.filterwarnings("ignore", "Error parsing type annotation")  # it needs what only a type checker imports
    warnings.filterwarnings("ignore", "Cannot determine where .*Pieces._is_param")  # torch's Tensor has it by its metaclass
    rooms = [f"simclr_dist.{module.name}" for module in pkgutil.iter_modules(simclr_dist.__path__)]
    rooms.remove("simclr_dist.train")  # pdoc finds it by itself: it has the name of a public function
    # Kernels are in a language of their own, which needs Triton.
    kernels = (r"!simclr_dist\.method\.loss\.fused", r"!simclr_dist\.data\.views\.colour_cuda")
    pdoc.pdoc("simclr_dist", *rooms, *kernels, output_directory=into)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
