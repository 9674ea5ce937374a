"""What do kNN and the linear probe cost beside faiss-cpu's flat index and scikit-learn's logistic regression?

    python benchmarks/eval.py                                       (50,000 x 512 and 10,000 x 512, one thread)
    python benchmarks/eval.py --train 5000 --test 1000 --repetitions 2       (a smoke run)
    python benchmarks/eval.py --features TRAIN.parquet TEST.parquet       (of `simclr-dist embed`, or of RUN/eval/features)

Wants faiss-cpu and scikit-learn. With --features, of an encoder, and kNN is compared with scikit-learn's too. Without, features
are made, not measured: each class a centre, around it noise whose spectrum falls as
in a trained encoder's, then a rotation and a ReLU. All that a user would wait for is inside the time: for kNN normalising,
building the index, searching and voting (the same vote for both, with k = 200); for the probe standardising, fitting and
predicting, with the same penalty and both at their defaults otherwise (scikit-learn: lbfgs, tol 1e-4, max_iter 10,000; float32
for both). A repetition takes each contestant in turn, the order reversed every second time; time is CPU time of the process.
The ratio's range is that of the paired ratios, repetition by repetition. `as exact` is the share of test rows with the exact
answer's prediction: for the probe scikit-learn's in float64 at tol 1e-7 (its default stops earlier than ours), untimed; for kNN
a stable sort in float64. `apart` is theirs' top-1 less ours in points, and the share of test rows
with equal predictions. The last row is our probe with its penalty chosen on a split of the training rows.
"""

import argparse
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from simclr_dist.evaluate.features.file import read_features
from simclr_dist.evaluate.protocols.knn import weighted_knn
from simclr_dist.evaluate.protocols.linear import linear_probe
from simclr_dist.evaluate.settings import Settings

DIM = 512  # of features that are made, in CLASSES
CLASSES = 10
L2S = (1e-1, 1e-2, 1e-3, 1e-4)
K, TEMPERATURE = Settings.k, Settings.temperature

Contestant = Callable[[], Tensor]


def features(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """[n, DIM] float32 features and [n] labels."""
    shared = torch.Generator().manual_seed(7)
    spectrum = 6 * torch.arange(1, DIM + 1).pow(-0.5)
    mixing = torch.linalg.qr(torch.randn(DIM, DIM, generator=shared))[0] * spectrum[:, None]
    mixing = mixing @ torch.linalg.qr(torch.randn(DIM, DIM, generator=shared))[0]
    centres = 0.18 * torch.randn(CLASSES, DIM, generator=shared)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    return ((centres[labels] + torch.randn(n, DIM, generator=generator)) @ mixing).relu_(), labels


def features_of(path: Path) -> tuple[Tensor, Tensor]:
    """[n, d] features and [n] labels of a file, of its images that have a label."""
    table = read_features(path)
    labels = torch.from_numpy(table.label.copy())
    return torch.from_numpy(table.embedding).float()[labels >= 0], labels[labels >= 0]


def faiss_knn(train_h: Tensor, train_y: Tensor, test_h: Tensor, classes: int) -> Tensor:
    """Predictions by the exact inner-product index, with the vote of `weighted_knn`."""
    keys, queries = (np.ascontiguousarray(torch.nn.functional.normalize(h, dim=1).numpy()) for h in (train_h, test_h))
    index = faiss.IndexFlatIP(keys.shape[1])
    index.add(keys)
    similarity, neighbours = map(torch.from_numpy, index.search(queries, min(K, len(keys))))
    weight = ((similarity - similarity[:, :1]) / TEMPERATURE).double().exp()
    votes = torch.zeros(len(queries), classes, dtype=torch.float64)
    return votes.scatter_add_(1, train_y[neighbours], weight).argmax(dim=1)


def exact_knn(train_h: Tensor, train_y: Tensor, test_h: Tensor, classes: int) -> Tensor:
    """Predictions by sorting all float64 similarities."""
    keys, found = torch.nn.functional.normalize(train_h.double(), dim=1), []
    for queries in test_h.double().split(200):
        similarity, order = (torch.nn.functional.normalize(queries, dim=1) @ keys.T).sort(dim=1, descending=True, stable=True)
        votes = torch.zeros(len(queries), classes, dtype=torch.float64)
        found.append(votes.scatter_add_(1, train_y[order[:, :K]], (similarity[:, :K] / TEMPERATURE).exp()).argmax(dim=1))
    return torch.cat(found)


def scikit_learn_knn(train_h: Tensor, train_y: Tensor, test_h: Tensor) -> Tensor:
    """Predictions by KNeighborsClassifier with the weights of `weighted_knn`."""
    model = KNeighborsClassifier(
        min(K, len(train_h)), weights=lambda distance: np.exp((1 - distance) / TEMPERATURE), algorithm="brute", metric="cosine"
    )
    return torch.from_numpy(model.fit(train_h.numpy(), train_y.numpy()).predict(test_h.numpy()))


def scikit_learn(train_h: Tensor, train_y: Tensor, test_h: Tensor, l2: float, tol: float = 1e-4) -> Tensor:
    """Predictions by LogisticRegression (lbfgs) on standardised features, in their type."""
    mean, deviation = train_h.mean(dim=0), train_h.std(dim=0, correction=0)
    x, asked = (((h - mean) / deviation).numpy() for h in (train_h, test_h))
    model = LogisticRegression(C=1 / (l2 * len(x)), max_iter=10_000, tol=tol).fit(x, train_y.numpy())
    return torch.from_numpy(model.predict(asked))


def measure(contestants: dict[str, Contestant], repetitions: int) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """CPU seconds of each repetition and the last predictions, after one untimed call of each."""
    predictions = {name: call() for name, call in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for repetition in range(repetitions):
        for name in list(contestants)[:: -1 if repetition % 2 else 1]:
            start = time.process_time()
            predictions[name] = contestants[name]()
            seconds[name].append(time.process_time() - start)
    return seconds, predictions


def row(title: str, measured: tuple[dict[str, list[float]], dict[str, Tensor]], exact: Tensor, labels: Tensor) -> str:
    (ours, theirs), predictions = measured[0].values(), [*measured[1].values(), exact]
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    accuracy = [100 * float((predicted == labels).double().mean()) for predicted in predictions]
    same = [100 * float((predicted == exact).double().mean()) for predicted in predictions]
    return (
        f"| {title} | {statistics.median(ours):.2f} | {statistics.median(theirs):.2f} "
        f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
        f"| {accuracy[0]:.2f} / {accuracy[1]:.2f} / {accuracy[2]:.2f} | {same[0]:.2f} / {same[1]:.2f} "
        f"| {accuracy[1] - accuracy[0]:+.2f}, {100 * float((predictions[0] == predictions[1]).double().mean()):.2f} % |"
    )


def conditions(threads: int, repetitions: int, train: Tensor, test: Tensor, classes: int) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "faiss-cpu", "scikit-learn", "numpy", "scipy")
    )
    return (
        f"{processor}, {os.cpu_count()} CPUs, {threads} thread(s); Python {platform.python_version()}, {versions}; "
        f"{len(train)} x {train.shape[1]} training and {len(test)} x {test.shape[1]} test rows, {classes} classes, "
        f"n = {repetitions} paired repetitions, median CPU seconds"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=50_000, help="training rows (%(default)s)")
    parser.add_argument("--test", type=int, default=10_000, help="test rows (%(default)s)")
    parser.add_argument(
        "--features", type=Path, nargs=2, metavar=("TRAIN", "TEST"), help="files of features, in place of made ones"
    )
    parser.add_argument("--repetitions", type=int, default=5, help="timed calls of each contestant (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch, faiss and BLAS (%(default)s)")
    parser.add_argument("--l2", type=float, nargs="+", default=L2S, help="penalties of the probe (%(default)s)")
    arguments = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != str(arguments.threads):  # BLAS reads it at start only
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | dict.fromkeys(names, str(arguments.threads)))
    if arguments.features:
        (train_h, train_y), (test_h, test_y) = map(features_of, arguments.features)
        classes = int(max(train_y.max(), test_y.max())) + 1
    else:
        (train_h, train_y), (test_h, test_y) = features(arguments.train, seed=0), features(arguments.test, seed=1)
        classes = CLASSES
    print(conditions(arguments.threads, arguments.repetitions, train_h, test_h, classes) + "\n")
    print("| | ours | theirs | theirs / ours (range) | top-1, ours / theirs / exact | as exact, ours / theirs | apart |")
    print("|---|---|---|---|---|---|---|")
    measured = measure(
        {
            "ours": lambda: weighted_knn(train_h, train_y, test_h, classes=classes).argmax(dim=1),
            "theirs": lambda: faiss_knn(train_h, train_y, test_h, classes),
        },
        arguments.repetitions,
    )
    exact = exact_knn(train_h, train_y, test_h, classes)
    print(row("kNN / faiss-cpu IndexFlatIP", measured, exact, test_y), flush=True)
    if arguments.features:
        measured = measure(
            {
                "ours": lambda: weighted_knn(train_h, train_y, test_h, classes=classes).argmax(dim=1),
                "theirs": lambda: scikit_learn_knn(train_h, train_y, test_h),
            },
            arguments.repetitions,
        )
        print(row("kNN / scikit-learn KNeighborsClassifier", measured, exact, test_y), flush=True)
    for l2 in arguments.l2:
        measured = measure(
            {
                "ours": lambda l2=l2: linear_probe(train_h, train_y, classes=classes, l2=l2)[0](test_h).argmax(dim=1),
                "theirs": lambda l2=l2: scikit_learn(train_h, train_y, test_h, l2),
            },
            arguments.repetitions,
        )
        title = f"L-BFGS probe / scikit-learn, l2 {l2:g}"
        exact = scikit_learn(train_h.double(), train_y, test_h.double(), l2, tol=1e-7)
        print(row(title, measured, exact, test_y), flush=True)
    start = time.process_time()
    predict, info = linear_probe(train_h, train_y, classes=classes)
    accuracy = 100 * float((predict(test_h).argmax(dim=1) == test_y).double().mean())
    print(f"| L-BFGS probe with choice (l2 {info['l2']:.3g}) | {time.process_time() - start:.2f} | | | {accuracy:.2f} | | |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
