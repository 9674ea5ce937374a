"""What judging large sets costs: kNN and the linear probe on synthetic features, CPU seconds and memory, and faiss beside them.

    python benchmarks/features.py --images 1280000 --size 2048 --test 500
    python benchmarks/features.py --images 160000 --size 2048 --test 2000 --before OTHER_CLONE --faiss

Features are a class's centre and noise, in a feature file as `eval` keeps it. Each contestant is a process of its own, in turn:
it reads the file and predicts the test rows. Memory is the most that it had for itself alone (RssAnon, looked at 20 times a
second) above what it had after its imports: the pages of mapped files are the system's, which takes them back. `--before`: the
package of another clone, an older one. `--faiss`: an exact index of inner products over the same rows (pip install faiss-cpu).
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

K, TEMPERATURE, L2 = 200, 0.1, 1e-3


def main() -> None:
    """Measure in turn, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--iterations", type=int, default=3, help="of the linear probe")
    parser.add_argument("--before", type=Path, help="another clone, with the package before")
    parser.add_argument("--faiss", action="store_true")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.child:
        _child(told, *told.child)
        return
    import torch

    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{told.images} x {told.size} features, {told.classes} classes, {told.test} test images\n")
    here = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR") or "/var/tmp") as folder:
        _write(told, Path(folder))
        contestants = [("kNN", "knn", here), ("linear probe", "linear", here)]
        if told.before:
            contestants += [
                ("kNN, before", "knn", told.before.resolve()),
                ("linear probe, before", "linear", told.before.resolve()),
            ]
        if told.faiss:
            contestants.append(("kNN, faiss", "faiss", here))
        first: dict[str, list[int]] = {}
        for title, kind, package in contestants:
            command = [sys.executable, __file__, *sys.argv[1:], "--child", kind, folder]
            environment = {**os.environ, "PYTHONPATH": f"{package}:{os.environ.get('PYTHONPATH', '')}"}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            same = first.setdefault("knn" if kind == "faiss" else kind, found["predictions"])
            alike = 100 * np.mean(np.equal(same, found["predictions"]))
            numbers = f"{found['cpu']:8.1f} CPU-s {found['wall']:8.1f} s {found['memory'] / 2**20:8.0f} MiB of its own"
            print(f"  {title:22} {numbers}, {alike:.2f} % of predictions as ours", flush=True)


def _write(told: argparse.Namespace, folder: Path) -> None:
    from simclr_dist.evaluate.features.file import About, write_features
    from simclr_dist.evaluate.space import empty

    draw = np.random.default_rng(0)
    centres = draw.standard_normal((told.classes, told.size), dtype=np.float32)
    for name, count in (("train", told.images), ("test", told.test)):
        label = draw.integers(told.classes, size=count)
        h = empty(count, told.size, np.float32)
        for start in range(0, count, 8192):
            part = slice(start, start + 8192)
            h[part] = centres[label[part]] + 6 * draw.standard_normal(h[part].shape, dtype=np.float32)
        about = About("", {}, "h", 224, "fp32", "", ())
        write_features(folder / f"{name}.parquet", [f"{row:09d}" for row in range(count)], label, h, about)


def _child(told: argparse.Namespace, kind: str, folder: str) -> None:
    import torch

    from simclr_dist.evaluate.features.file import read_features
    from simclr_dist.evaluate.protocols.knn import weighted_knn
    from simclr_dist.evaluate.protocols.linear import linear_probe

    def ours(train: Any, test: Any) -> list[int]:
        h, y, q = torch.from_numpy(train.embedding), torch.tensor(train.label), torch.from_numpy(test.embedding)
        if kind == "knn":
            scores = weighted_knn(h, y, q, k=K, temperature=TEMPERATURE, classes=told.classes)
        else:
            scores = linear_probe(h, y, classes=told.classes, l2=L2, max_iter=told.iterations)[0](q)
        predictions: list[int] = scores.argmax(dim=1).tolist()
        return predictions

    def faiss_knn(train: Any, test: Any) -> list[int]:
        import faiss

        rows = [one.embedding / np.linalg.norm(one.embedding, axis=1, keepdims=True) for one in (train, test)]
        index = faiss.IndexFlatIP(told.size)
        index.add(rows[0])
        cosine, places = index.search(rows[1], K)
        votes = np.zeros((len(rows[1]), told.classes))
        np.add.at(votes, (np.arange(len(votes))[:, None], train.label[places]), np.exp((cosine - 1) / TEMPERATURE))
        predictions: list[int] = votes.argmax(axis=1).tolist()
        return predictions

    predict: Callable[[Any, Any], list[int]] = faiss_knn if kind == "faiss" else ours
    before, most = _private(), [0]

    def look() -> None:
        while True:
            most[0] = max(most[0], _private() - before)
            time.sleep(0.05)

    threading.Thread(target=look, daemon=True).start()
    begin, cpu = time.perf_counter(), time.process_time()
    predictions = predict(*(read_features(Path(folder, f"{name}.parquet")) for name in ("train", "test")))
    wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
    print(json.dumps({"cpu": cpu, "wall": wall, "memory": most[0], "predictions": predictions}))


def _private() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


if __name__ == "__main__":
    main()
