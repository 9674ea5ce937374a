"""All that shall be proved and measured on a GPU, in order, within minutes.

    python benchmarks/gpu.py                                          (8 minutes on the first GPU; or `make gpu`)
    python benchmarks/gpu.py --wheels DIR --cifar TRAIN.parquet --cifar-test TEST.parquet --folder FOLDER
    python benchmarks/gpu.py --parts cifar --folder FOLDER ...        (goes on with what is unfinished in the folder)
    python benchmarks/gpu.py --rehearse                               (tiny, on the CPU: does every line run?)

For a machine with torch 2.11 to 2.14, CUDA and no network: packages that it lacks come from wheels in a folder, and a peer
that is absent is named in the table. Each part is a process with a time limit (for 8 minutes; others are longer or shorter in
proportion). What hangs or fails costs itself alone. The results, a table and a JSON file named by card and date, are written
after each part, so that a cut loses nothing; parts that were measured on the same day with the same card stay in them.

    versions  card, driver, packages             step    ResNet-50 at 224, bf16: runs from JPEG shards, eager and compiled,
    check     `simclr-dist check` on the device          against the bare encoder
    loss      N = 4096 to 65536, beside others   large   batch 4096 by micro-batches, against accumulation
    lars      beside timm's and others           resume  `deterministic`: stopped, killed, and the same bits?
    colour    a portion, plain and by kernels    kill    kill -9: what it costs
    images    generated JPEG shards              cifar   CIFAR-10, ResNet-18, for the rest of the time

Ends with 1 when a part was cut, or something of ours has failed in it; a target that is missed is no failure.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PARTS = ROOT / "benchmarks" / "gpu_parts.py"
RESULTS = ROOT / "benchmarks" / "results"
SECONDS = {  # of 8 minutes; cifar has the rest
    "versions": 20, "check": 45, "loss": 80, "lars": 15, "colour": 15, "images": 20, "step": 115, "large": 45, "resume": 45,
    "kill": 30, "cifar": 0,
}  # fmt: skip
WHOLE = "whole"
LEAST = 10  # seconds that a part is begun with

Row = dict[str, Any]


def environment(folder: Path, wheels: Path | None, *, rehearse: bool) -> dict[str, str]:
    """The variables of the parts; what lies in `wheels` is installed for them, into the folder."""
    paths = [str(ROOT)]
    if wheels is not None:
        site, files = folder / "site", sorted(map(str, wheels.glob("*.whl")))
        if not files:
            sys.exit(f"--wheels: {wheels} holds no wheel")
        if not site.exists():
            part = folder / "site.part"
            shutil.rmtree(part, ignore_errors=True)
            install = ["install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(part), *files]
            if subprocess.run([sys.executable, "-m", "pip", *install], check=False).returncode:
                sys.exit(f"--wheels: pip cannot install what {wheels} holds: one wheel a package, for this Python")
            part.rename(site)
        paths.append(str(site))
    variables = {"PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])}
    return os.environ | variables | ({"OMP_NUM_THREADS": "1"} if rehearse else {})


def rows_of(folder: Path, part: str) -> list[Row]:
    """What the part has written so far; the last line may be cut."""
    rows = []
    file = folder / "parts" / f"{part}.jsonl"
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def run_part(part: str, told: argparse.Namespace, folder: Path, limit: float, variables: dict[str, str]) -> list[Row]:
    """One part in a process of its own; its figures, and how it has ended if not well."""
    from processes import end

    (folder / "parts" / f"{part}.jsonl").unlink(missing_ok=True)
    task = {"part": part, "folder": str(folder), "rehearse": told.rehearse, "until": time.time() + limit}
    task |= {"cifar": told.cifar, "cifar_test": told.cifar_test}
    command = [sys.executable, str(PARTS), json.dumps(task)]
    said = folder / "parts" / f"{part}.txt"
    begin = time.monotonic()
    with said.open("w") as output:
        child = subprocess.Popen(command, env=variables, stdout=output, stderr=output, start_new_session=True, text=True)
        try:
            code: int | None = child.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(child)
    rows, seconds = rows_of(folder, part), round(time.monotonic() - begin, 1)
    ending = {0: WHOLE, None: f"cut after {limit:.0f} s"}.get(code, f"exit code {code}: {_last_lines(said)}")
    return [*rows, _ending(part, ending, seconds)]


def _ending(part: str, how: str, seconds: float) -> Row:
    failed = how != WHOLE
    row = {"part": part, "figure": "part", "value": how, "unit": "", "n": 1, "target": WHOLE, "met": not failed}
    return row | {"failed": failed, "seconds": seconds}


def _last_lines(file: Path) -> str:
    return " / ".join(file.read_text(errors="replace").strip().splitlines()[-3:])[-400:]


def name_of(rows: list[Row], *, rehearse: bool) -> str:
    """Of the result files: by card and date."""
    cards = [str(row["value"]) for row in rows if row["figure"] == "card"]
    card = "rehearsal" if rehearse else re.sub(r"[^a-z0-9]+", "-", (cards or ["unknown"])[0].lower()).strip("-")
    return f"gpu-{card}-{datetime.date.today():%Y-%m-%d}"


def machine(rows: list[Row]) -> dict[str, str]:
    """Card, driver and versions, which go with every figure."""
    return {row["figure"]: str(row["value"]) for row in rows if row["part"] == "versions" and row["figure"] != "part"}


def table(rows: list[Row], command: str) -> str:
    """Markdown."""
    about = machine(rows)
    main = ("card", "nvidia-smi", "capability", "torch", "triton", "python", "cores")
    lines = [", ".join(f"{name} {about[name]}" for name in main if name in about), "", f"`{command}`", ""]
    lines += ["| part | figure | value | n | target | |", "|---|---|---|---|---|---|"]
    for row in rows:
        value = f"{row['value']:.3g}" if isinstance(row["value"], float) and abs(row["value"]) < 0.01 else row["value"]
        met = {True: "met", False: "**missed**", None: ""}[row["met"]]
        cells = [row["part"], row["figure"], f"{value} {row['unit']}", row["n"], row["target"], met]
        lines.append("| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ").strip() for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def write_results(results: Path, rows: list[Row], command: str, *, rehearse: bool) -> Path:
    """The table and the JSON file; parts that are there from an earlier call stay."""
    results.mkdir(parents=True, exist_ok=True)
    file = results / f"{name_of(rows, rehearse=rehearse)}.json"
    earlier = json.loads(file.read_text())["rows"] if file.exists() else []
    mine = {row["part"] for row in rows}
    every = sorted(
        [*rows, *(row for row in earlier if row["part"] not in mine)], key=lambda row: list(SECONDS).index(row["part"])
    )
    content = json.dumps({"command": command, "machine": machine(every), "rows": every}, indent=1)
    for path, text in ((file, content), (file.with_suffix(".md"), table(every, command))):
        part = path.with_name(f".{path.name}.part")
        part.write_text(text)
        part.replace(path)
    return file.with_suffix(".md")


def arguments() -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together (%(default)g)")
    parser.add_argument("--parts", nargs="+", choices=SECONDS, default=list(SECONDS))
    parser.add_argument("--folder", type=Path, help="for shards, runs and caches; kept (default: a temporary one)")
    parser.add_argument("--results", type=Path, help="of the table and JSON (default: benchmarks/results)")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels of packages that this machine lacks")
    parser.add_argument("--cifar", metavar="FILE", help="CIFAR-10's training images, in any form that `shard` takes")
    parser.add_argument("--cifar-test", metavar="FILE", help="its test images")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU, judged by nobody")
    told = parser.parse_args()
    if told.minutes <= 0:
        parser.error("--minutes must be above 0")
    return told


def main() -> int:
    """Do the parts in turn."""
    told = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # no part stays behind
    deadline = time.monotonic() + 60 * told.minutes
    command = " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]])
    with tempfile.TemporaryDirectory() as temporary:
        folder = (told.folder or Path(temporary)).resolve()
        (folder / "parts").mkdir(parents=True, exist_ok=True)
        results = told.results or (folder / "results" if told.rehearse else RESULTS)
        variables = environment(folder, told.wheels, rehearse=told.rehearse)
        sys.path.insert(0, str(ROOT))
        rows: list[Row] = []
        for part in ["versions", *(part for part in SECONDS if part in told.parts and part != "versions")]:
            left = deadline - time.monotonic()
            limit = min(left, max(LEAST, SECONDS[part] * told.minutes / 8 or left))
            if left < LEAST:
                rows.append(_ending(part, "not run: no time was left", 0))
            else:
                rows += run_part(part, told, folder, limit, variables)
            file = write_results(results, rows, command, rehearse=told.rehearse)
            print(f"{part}: {rows[-1]['value']}", flush=True)
        print(f"\n{file.read_text()}\n{file}")
    return 1 if any(row["failed"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
