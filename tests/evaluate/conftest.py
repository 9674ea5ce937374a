"""Small labelled shards and encoder files, made here so that the tests depend on no other writer."""

import hashlib
import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evaluated import CARD, CLASSES
from simclr_dist.data.manifest import ManifestRow, write_manifest
from simclr_dist.encoder.file import export_encoder, untrained_encoder
from simclr_dist.encoder.names import encoder_path


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., Path]:
    """Writes images and labels as two tars with their manifest; returns the folder."""

    def make(name: str, images: np.ndarray, labels: Sequence[int], classes: Sequence[str] = CLASSES) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        rows = []
        for shard, part in enumerate(np.array_split(np.arange(len(images)), 2)):
            file_name = f"part-{shard}.tar"
            with tarfile.open(folder / file_name, "w", format=tarfile.USTAR_FORMAT) as tar:
                for row in part:
                    content = io.BytesIO()
                    Image.fromarray(images[row]).save(content, "PNG")
                    member = tarfile.TarInfo(f"{row:06d}.png")
                    member.size = len(content.getvalue())
                    content.seek(0)
                    offset = tar.offset + 512
                    tar.addfile(member, content)
                    digest = hashlib.sha256(content.getvalue()).digest()
                    size = images[row].shape[1], images[row].shape[0]
                    rows.append(ManifestRow(f"{row:06d}", file_name, offset, member.size, int(labels[row]), *size, digest))
        write_manifest(folder, ["part-0.tar", "part-1.tar"], rows, classes)
        return folder

    return make


@pytest.fixture
def make_encoder(tmp_path: Path) -> Callable[..., Path]:
    """Exports an encoder with fresh weights in a run folder; keywords change its card."""

    def make(seed: int = 5, run: str = "run", **card: Any) -> Path:
        path = encoder_path(tmp_path / run, card.get("step", CARD["step"]))
        encoder = untrained_encoder(CARD, seed)
        with torch.no_grad():
            for name, weight in encoder.named_parameters():
                if name.endswith("bn2.weight"):
                    weight.fill_(1)
        export_encoder(path, encoder, {**CARD, **card})
        return path

    return make
