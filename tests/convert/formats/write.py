"""Writes the small files beside it with the libraries of their formats, each in an environment of its own:

    python write.py mds         # mosaicml-streaming 0.13.0
    python write.py litdata     # litdata 0.2.76 and zstd 1.5.7
    python write.py tfrecord    # tensorflow-cpu 2.21.0

Seven pictures each, number i of colour (30 i, 200, 9 i), its label i % 3.
"""

import io
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image

HERE = Path(__file__).resolve().parent
COUNT = 7


def picture(i: int) -> Image.Image:
    return Image.new("RGB", (10, 8), (30 * i, 200, 9 * i))


def encoded(i: int, kind: str) -> bytes:
    target = io.BytesIO()
    picture(i).save(target, kind)
    return target.getvalue()


def sample(i: int) -> dict[str, Any]:
    jpeg = Image.open(io.BytesIO(encoded(i, "JPEG")))
    return {"image": jpeg, "label": i % 3, "raw": picture(i), "name": f"number {i}"}


def in_a_tuple(i: int) -> tuple[bytes, int]:
    return encoded(i, "PNG"), i % 3


def pickled(i: int) -> dict[str, Any]:
    return {"image": picture(i), "label": 1j * i}


def mds() -> None:
    from streaming import MDSWriter

    columns = {"image": "jpeg", "label": "int", "raw": "pil", "name": "str"}
    for name, compression in (("mds", None), ("mds-zstd", "zstd:7"), ("mds-gz", "gz")):
        shutil.rmtree(HERE / name, ignore_errors=True)
        with MDSWriter(
            out=str(HERE / name), columns=columns, compression=compression, hashes=["sha1"], size_limit=4000
        ) as writer:
            for i in range(COUNT):
                writer.write(sample(i))
    shutil.rmtree(HERE / "mds-pkl", ignore_errors=True)
    with MDSWriter(out=str(HERE / "mds-pkl"), columns={"image": "pkl", "png": "png", "label": "uint8", "y": "pkl"}) as writer:
        for i in range(COUNT):
            writer.write({"image": picture(i), "png": picture(i), "label": i % 3, "y": {i}})


def litdata() -> None:
    import litdata

    for name, make, how in (
        ("litdata", sample, {}),
        ("litdata-zstd", sample, {"compression": "zstd", "compression_level": "chunk"}),
        ("litdata-framed", sample, {"compression": "zstd"}),
        ("litdata-tuple", in_a_tuple, {}),
        ("litdata-pickle", pickled, {}),
    ):
        shutil.rmtree(HERE / name, ignore_errors=True)
        litdata.optimize(fn=make, inputs=list(range(COUNT)), output_dir=str(HERE / name), num_workers=1, chunk_size=4, **how)


def tfrecord() -> None:
    import tensorflow as tf

    def feature(**value: Any) -> Any:
        return tf.train.Feature(
            **{f"{kind}_list": getattr(tf.train, f"{kind.title()}List")(value=v) for kind, v in value.items()}
        )

    for part in range(2):
        with tf.io.TFRecordWriter(str(HERE / f"pictures-train.tfrecord-{part:05d}-of-00002")) as writer:
            for i in range(4 * part, min(4 * part + 4, COUNT)):
                features = {
                    "image": feature(bytes=[encoded(i, "JPEG")]),
                    "label": feature(int64=[i % 3]),
                    "size": feature(float=[10, 8]),
                    "negative": feature(int64=[-i - 1]),
                    "many": feature(int64=[1, 300, 70000]),
                    "none": feature(int64=[]),
                }
                writer.write(tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString())


if __name__ == "__main__":
    {"mds": mds, "litdata": litdata, "tfrecord": tfrecord}[sys.argv[1]]()
