"""Keep feature files beside a result. So the next evaluation of the same encoder need not read the images."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simclr_dist.evaluate.features.file import About, Embedding, FeatureTable, read_about, read_features, write_features
from simclr_dist.system.errors import DataError
from simclr_dist.system.files import remove_leftovers


def features_folder(result: Path) -> Path:
    """Return the folder of a result's features. It is RUN/eval/features for all of a run, else named as the result."""
    return result.parent / "features" if result.parent.name == "eval" else result.with_suffix(".features")


class FeatureStore:
    """The feature files of one folder. They are found by what they are features of, whatever their names.

    A file that cannot be used is passed over, and `say` gets a line that names it. It is overwritten only where it has the
    name of new features (`About.digest`, 16 digits).
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self._say = folder, say
        self.reused: dict[str, str] = {}
        self._about: dict[Path, About] = {}
        self._kept: list[Path] = []
        remove_leftovers(folder, "*.parquet")
        for path in sorted(folder.glob("*.parquet")):
            try:
                self._about[path] = read_about(path)
            except DataError as error:
                say(f"{error}; it is passed over")

    def find(self, title: str, about: About, key: Sequence[str]) -> FeatureTable | None:
        """Read features of exactly `about` for the images `key`. They are in the keys' order; None where no file has them."""
        for path in (path for path, held in self._about.items() if held == about):
            try:
                table = read_features(path)
            except DataError as error:
                self._say(f"{error}; the images are read")
                continue
            if table.about == about and table.key == tuple(key):
                self.reused[title] = str(path)
                return table
            self._say(f"{path}: has {len(table.key)} images, not exactly the {len(key)} asked for; the images are read")
        return None

    def keep(self, about: About, key: Sequence[str], label: NDArray[np.int64], embedding: Embedding) -> None:
        """Write features. Where that fails, `say` gets the reason: the evaluation does not need the file."""
        path = self.folder / f"{about.digest()[:16]}.parquet"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_features(path, key, label, embedding, about)
            self._kept.append(path)
        except OSError as error:
            self._say(f"{self.folder}: cannot be made: {error.strerror}; features are not kept")
        except DataError as error:
            self._say(f"{error}; they are not kept")

    def report(self) -> None:
        """Say what was written, and how large it is."""
        if self._kept:
            size = sum(path.stat().st_size for path in self._kept) / 2**20
            self._say(f"features kept in {self.folder}: {len(self._kept)} files, {size:.1f} MiB")
