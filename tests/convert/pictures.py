"""Small images, and sources made of them."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from simclr_dist.data.manifest import load_manifest


def encoded(seed: int = 0, kind: str = "PNG", width: int = 24, height: int = 16, mode: str = "RGB", **options: Any) -> bytes:
    """A picture that no other seed gives."""
    y, x = np.mgrid[:height, :width]
    blue = np.full_like(x, seed % 256)
    pixels = np.stack([x * 255 // width, (y * 255 // height + seed // 256) % 256, blue], -1).astype(np.uint8)
    target = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(target, kind, **options)
    return target.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    """All files' bytes by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def stored(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Source name -> label and image bytes, of a folder of shards."""
    import tarfile

    manifest = load_manifest(folder)
    found = {}
    for shard in manifest.shards:
        with tarfile.open(folder / shard) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name, content in members.items():
            key, extension = name.split(".")
            if extension == "json":
                image = next(members[f"{key}.{kind}"] for kind in ("jpg", "png", "webp") if f"{key}.{kind}" in members)
                found[json.loads(content)["source"]] = (int(members.get(f"{key}.cls", b"-1")), image)
    return found
