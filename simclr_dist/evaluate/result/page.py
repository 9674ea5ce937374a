"""Show an evaluation as one self-contained HTML page. It has numbers, curves, neighbours, and how to repeat it."""

import base64
import math
import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from operator import itemgetter
from pathlib import Path
from typing import Any

from simclr_dist.evaluate.features.extraction import RAW_PIXELS
from simclr_dist.evaluate.protocols.scores import confusions
from simclr_dist.evaluate.result.charts import line_chart
from simclr_dist.evaluate.result.curves import comparable
from simclr_dist.evaluate.result.file import SETS, TRAINED, UNTRAINED, Result, title
from simclr_dist.evaluate.result.report import cell, counts, leak, percent, protocol_notes, signal_rows
from simclr_dist.run.folder import read_metrics
from simclr_dist.system.errors import DataError, refusing
from simclr_dist.system.files import write_atomically

_LABELS = {RAW_PIXELS: "raw pixels", UNTRAINED: "untrained encoder", TRAINED: "trained encoder"}
_MOST_CLASSES = 40  # of a confusion matrix that can still be read
_MOST_CONFUSIONS = 20  # that are listed where it cannot
_STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --soft: #666; --line: #ddd; --cell: 31, 95, 168; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #17191c; --soft: #9a9a9a; --line: #3a3d42; --cell: 90, 150, 220; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
body { max-width: 980px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
p.warning { border-left: .3rem solid #c60; padding-left: .7rem; font-weight: 600; }
p.sub, .tick, caption, th { color: var(--soft); fill: var(--soft); font-weight: normal; }
table { border-collapse: collapse; } td, th { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }
td:first-child, th:first-child { text-align: left; } .best { font-weight: 600; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; } .charts svg { width: 460px; max-width: 100%; }
.signals td:last-child, .signals th:last-child { text-align: left; color: var(--soft); }
.facts td { text-align: left; overflow-wrap: anywhere; }
svg text { font: 11px system-ui, sans-serif; fill: var(--ink); }
svg .tick { fill: var(--soft); } svg .title { font-size: 13px; }
svg .grid { stroke: var(--line); } .scroll { overflow-x: auto; } img { max-width: 100%; }
.confusion td { padding: .15rem .4rem; text-align: center; border: 0; font-size: 12px; }
.confusion th { font-size: 12px; }
.confusion tr:first-child th { writing-mode: vertical-rl; rotate: 180deg; padding: .4rem .1rem; text-align: left; }
pre { background: rgba(128, 128, 128, .12); padding: .7rem; white-space: pre-wrap; font-size: 13px; }
"""
_BEGIN = (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    '<meta name="generator" content="simclr_dist">'
)


def write_page(path: Path, text: str) -> None:
    """Write the page's `text`. Raises DataError when the disk does not take it."""
    with refusing(f"{path}: cannot write the page"):
        write_atomically(path, text.encode())


def claim_page(path: Path) -> None:
    """Raise DataError where `path` exists and is no page of ours. `write_page` would replace it."""
    try:
        with path.open("rb") as file:
            ours = file.read(len(_BEGIN)).decode(errors="replace") in ("", _BEGIN)
    except OSError:  # nothing there; or nothing that can be replaced, which write_page says
        return
    if not ours:
        raise DataError(f"{path}: the page goes there, and it is no page of an evaluation; name another file with --out")


def page(result: Result, *, run: Path | None = None, pictures: Mapping[str, bytes] = {}) -> str:
    """Return the page's text. With `run`, it has curves of its training and its other results. `pictures` are PNGs by title."""
    encoder = result["encoder"]
    title = f"{encoder['name']}, step {encoder['step']}" + ("" if encoder["layer"] == "h" else f", layer {encoder['layer']}")
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="sub">{escape(str(encoder["file"]))}; {counts(result)}</p>',
        *(f'<p class="warning">{escape(warning)}</p>' for warning in leak(result)),
    ]
    if result["protocols"]:
        notes = "\n".join(protocol_notes(result, _LABELS))
        parts += [_accuracies(result), f"<pre>{escape(notes)}</pre>"]
    if charts := _charts(result, run):
        parts += ["<h2>Curves</h2>", f'<div class="charts">{charts}</div>']
    for words, picture in pictures.items():
        parts += [f"<h2>{escape(words)}</h2>", _picture(picture)]
    if result.get("signals"):
        rows = [[name.replace("_", " "), *map(_number, values), good] for name, *values, good in signal_rows(result)]
        table = _table(["signal of the test images", _LABELS[TRAINED], _LABELS[UNTRAINED], "how to read it"], rows)
        parts += ["<h2>Of the features themselves</h2>", f'<div class="signals">{table}</div>']
    parts += _confusions(result)
    parts += ["<h2>How to repeat it</h2>", *_origin(result)]
    return _whole(title, parts)


def picture_page(
    title: str, facts: Mapping[str, Any], sheets: Sequence[bytes], heads: Sequence[str], rows: Iterable[Sequence[str]],
    lines: Sequence[str] = (),
) -> str:  # fmt: skip
    """Return the text of a page of pictures. `sheets` are PNGs, `facts` how they came about, `rows` a table behind them.

    `lines` say what was found.
    """
    about = _table(["", ""], [[name, str(value)] for name, value in facts.items()])
    said = [f"<h1>{escape(title)}</h1>", *(f'<p class="sub">{escape(line)}</p>' for line in lines)]
    parts = [*said, *map(_picture, sheets), f'<div class="scroll facts">{_table(heads, rows)}</div>']
    return _whole(title, [*parts, "<h2>How it came about</h2>", f'<div class="facts">{about}</div>'])


def comparison_page(comparison: Result, links: Mapping[str, str]) -> str:
    """Return the text of a page that compares encoders. `links` leads from a name to its own page."""
    top1: dict[str, dict[str, list[float]]] = comparison["top1"]
    curves, places = defaultdict[str, dict[str, list[tuple[float, float]]]](lambda: defaultdict(list)), dict[float, str]()
    for name, rows in sorted(top1.items(), key=lambda item: float(item[0].partition("@")[2] or 1)):
        protocol, _, share = name.partition("@")
        places[x := math.log10(float(share or 1))] = f"{100 * float(share or 1):g} %"
        for encoder, row in rows.items():
            curves[f"{title(protocol)}: top-1 by the share of the labels"][encoder].append((x, row[0]))
    how: dict[str, Any] = {"axis": "share of the labels", "unit": " %", "places": places}
    charts = "".join(line_chart(one, lines, **how) for one, lines in curves.items() if len(places) > 1)
    names = dict.fromkeys(name for rows in top1.values() for name in rows)
    cells = ([name, *(_interval(rows.get(name)) for rows in top1.values())] for name in names)
    pages = (f'<a href="{escape(link, quote=True)}">{escape(name)}</a>' for name, link in links.items())
    parts = [
        f"<h1>{escape(next(iter(names)))} and what it has to beat</h1>",
        f'<p class="sub">{counts(comparison)}</p>',
        *(f'<p class="warning">{escape(warning)}</p>' for warning in leak(comparison)),
        *(f"<p>{escape(one['verdict'])}</p>" for one in comparison["verdicts"]),
        f'<div class="scroll">{_table(["top-1 %, and its 95 % interval", *map(title, top1)], cells)}</div>',
        f'<div class="charts">{charts}</div><p>Each has a page: {", ".join(pages)}</p>',
        f'<p class="sub">{escape(comparison["how"])}</p><pre>{escape(shlex.join(comparison["command"]))}</pre>',
    ]
    return _whole("Encoders compared", parts)


def _interval(row: Sequence[float] | None) -> str:
    return f"{percent(row[0], *row[3:])} ({row[1]:.2f} to {row[2]:.2f})" if row else ""


def _whole(title: str, parts: Iterable[str]) -> str:
    body = "\n".join(parts)
    return f"{_BEGIN}<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"


def _picture(png: bytes) -> str:
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _accuracies(result: Result) -> str:
    rows = []
    for protocol, part in result["protocols"].items():
        for name, measured in part["results"].items():
            low, high = measured.get("interval") or (math.nan, math.nan)
            interval = "" if math.isnan(low) else f"{low:.2f} to {high:.2f}"
            cells = [_number(measured.get(key)) for key in ("top5", "mean_per_class")]
            top1 = cell(measured)
            rows.append([f"{title(protocol)}: {_LABELS.get(name, name)}", top1, interval, *cells])
    return _table(["protocol", "top-1 %", "95 % interval", "top-5 %", "mean per class %"], rows, strong=_LABELS[TRAINED])


def _charts(result: Result, run: Path | None) -> str:
    if run is None:
        return ""
    lines = read_metrics(run)
    charts = [
        line_chart("loss", {name: _points(lines, f"loss/{name}") for name in ("nt_xent", "dcl", "chance")}),
        line_chart("learning rate", {"rate": _points(lines, "optim/learning_rate")}),
        line_chart("partner among the nearest 1 and 5", {k: _points(lines, f"retrieval/{k}") for k in ("top1", "top5")}),
    ]
    steps = [(step, protocols) for step, (protocols, _) in sorted(comparable(run / "eval", result).items(), key=itemgetter(0))]
    curves = {
        name: [(step, protocols[name]["results"][TRAINED]["top1"]) for step, protocols in steps if name in protocols]
        for name in result["protocols"]
    }
    return "\n".join([*charts, line_chart("test accuracy over checkpoints", curves, unit=" %")])


def _points(lines: Iterable[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(line["step"], line[name]) for line in lines if name in line]


def _confusions(result: Result) -> list[str]:
    names = [str(name) for name in result.get("class_names") or range(result["classes"])]
    parts = []
    for protocol, part in result["protocols"].items():
        matrix = part["results"].get(TRAINED, {}).get("confusion")
        if not matrix:
            continue
        if len(matrix) > _MOST_CLASSES:
            wrong = sorted((cell for cell in confusions(matrix) if cell[0] != cell[1]), key=lambda cell: -cell[2])
            rows = [[names[true], names[other], str(count)] for true, other, count in wrong[:_MOST_CONFUSIONS]]
            table = _table(["true class", "predicted", "test images"], rows)
            parts += [f"<h2>Most frequent confusions: {escape(protocol)}</h2>", table]
            continue
        lines = ["<caption>rows: true class; columns: predicted</caption>"]
        lines.append(f"<tr><th></th>{''.join(f'<th>{escape(name)}</th>' for name in names)}</tr>")
        for name, row in zip(names, matrix, strict=True):
            total = sum(row) or 1
            cells = "".join(f'<td style="background: rgba(var(--cell), {count / total:.2f})">{count}</td>' for count in row)
            lines.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
        table = f'<div class="scroll"><table class="confusion">{"".join(lines)}</table></div>'
        parts += [f"<h2>Confusions: {escape(protocol)}</h2>", table]
    return parts


def _origin(result: Result) -> list[str]:
    facts = {
        "encoder": result["encoder"]["sha256"],
        "started from": result["encoder"]["init"],
        **{f"{words} images": "{folder} ({digest})".format(**result[name]) for name, words in SETS.items() if name in result},
        "hardware": ", ".join(f"{name} {value}" for name, value in result["hardware"].items()),
        "versions": ", ".join(f"{name} {value}" for name, value in result["versions"].items()),
        "seconds": _number(result["seconds"]["total"]),
    }
    for protocol, part in result["protocols"].items():
        facts[f"{protocol} settings"] = ", ".join(f"{name} {value}" for name, value in part["settings"].items())
    table = _table(["", ""], [[name, str(value)] for name, value in facts.items()])
    command = [f"<pre>{escape(shlex.join(result['command']))}</pre>"] if result.get("command") else []
    return [*command, f'<div class="facts">{table}</div>']


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, strong: str = "") -> str:
    lines = [f"<tr>{''.join(f'<th>{escape(head)}</th>' for head in heads)}</tr>"]
    for row in rows:
        kind = ' class="best"' if strong and row[0].endswith(f": {strong}") else ""
        lines.append(f"<tr{kind}>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
