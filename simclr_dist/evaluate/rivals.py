"""Compare encoders on the same images, with what each has to beat. The first one is judged in words, with their uncertainty."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from simclr_dist.encoder.file import file_digest
from simclr_dist.encoder.names import Foreign, check_is_file, result_path
from simclr_dist.evaluate.features.extraction import RAW_PIXELS
from simclr_dist.evaluate.job import check_layer, claim_both, command_of, file_of, measure_one
from simclr_dist.evaluate.protocols.scores import paired_difference
from simclr_dist.evaluate.result.earlier import baselines, difference
from simclr_dist.evaluate.result.file import TRAINED, UNTRAINED, Result, UnwrittenError, read_result, title, write_result
from simclr_dist.evaluate.result.page import comparison_page, write_page
from simclr_dist.evaluate.result.report import DEVIATION, Say, counts, deviation, grid, leak, percent
from simclr_dist.evaluate.sets import Sets
from simclr_dist.evaluate.settings import Settings
from simclr_dist.method.distributed import World, all_gather_objects, on_rank_0, process_group
from simclr_dist.system.errors import ConfigError, DamagedError, DataError

FORMAT = "simclr_dist comparison 1"
_HOW = "Intervals: 95 %, for other test images (10,000 resamples, both answers to each). Another training is not in them."
_FEWEST = 6  # images with different answers: fewer, all on one side, can be chance (sign test, 5 %)

Encoder = str | Path | Foreign


def compare_encoders(
    encoders: Sequence[Encoder],
    train: str | Path,
    test: str | Path,
    *,
    val: str | Path | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    say: Say = lambda _: None,
    **settings: Any,
) -> Result:
    """Compare the first encoder with the others, and with its baselines. Returns this on rank 0.

    Each has a result as of `job.evaluate`; that of published weights lies in `rivals` beside the first's, without baselines.
    One that is there, of the same weights, images and settings, is not measured again. The comparison goes to
    `names.result_path`, its page beside it. Raises as `job.evaluate` does, ConfigError for two encoders of one name, and
    DataError without labels.
    """
    checked = Settings(**settings)
    path = result_path(file_of(encoders[0]), out, checked.layer, several=True)
    double, times = Counter(map(_name, encoders)).most_common(1)[0]
    if times > 1:
        raise ConfigError(f"{double}: is named twice; name each encoder once, and copy a file whose name another has")
    for encoder in encoders:
        check_is_file(file_of(encoder))
        check_layer(encoder, checked)
    results, places = dict[str, Result](), dict[str, str]()
    with process_group(device) as world:
        sets = Sets(train, test, val)
        if not sets.classes:
            raise DataError(f"{sets.train.folder}: no image has a label; encoders are compared by labels")
        on_rank_0(lambda: claim_both(path, named=True))
        for encoder in encoders:
            name, first = _name(encoder), next(iter(results.values()), None)
            results[name], places[name] = _measured(world, encoder, first, path.parent / "rivals", sets, checked, say)
            on_rank_0(lambda: None, however_long=True)  # it classifies alone, and may hold the store where the others wait
    if not world.is_main:
        return {}
    command = [*command_of(encoders[0], sets, checked), *(word for one in encoders[1:] for word in ("--rival", _word(one)))]
    comparison = {"format": FORMAT, **sets.describe(), **sets.shared(), **_side_by_side(results, checked)}
    several = any(len(row) > 3 for rows in comparison["top1"].values() for row in rows.values())
    comparison |= {"how": _HOW + f" {DEVIATION}." * several, "command": command}
    if line := write_result(path, comparison):
        say(line)
    try:
        write_page(path.with_suffix(".html"), comparison_page(comparison, places))
    except DataError as error:
        raise UnwrittenError(str(error), comparison, stored=path) from None
    return comparison


def _word(encoder: Encoder) -> str:
    """Spell an encoder as `published.rival` reads it. What was published has its own mean and deviation."""
    if isinstance(encoder, Foreign):
        return encoder.arch if encoder.mean else f"{encoder.arch}={encoder.weights}"
    return str(encoder)


def _name(encoder: Encoder) -> str:
    if isinstance(encoder, Foreign):
        return f"{encoder.arch} ({Path(encoder.weights).name})"
    return str(encoder).removesuffix(".safetensors").replace("/encoders/", "/")


def _measured(
    world: World, encoder: Encoder, first: Result | None, rivals: Path, sets: Sets, settings: Settings, say: Say
) -> tuple[Result, str]:
    """Return an encoder's result, stored or new, and its page's path."""
    path, out = result_path(file_of(encoder), layer=settings.layer), None
    if isinstance(encoder, Foreign) and first is not None:
        path = out = rivals / f"{encoder.arch.replace('/', '-')}-{Path(encoder.weights).name}.json"
        seed = settings.seed if "sgd" in settings.protocols else 0
        settings = dataclasses.replace(settings, baselines=False, seed=seed)
    say(f"{_name(encoder)}: {path}")
    result = on_rank_0(lambda: _stored(path, encoder, sets, settings), however_long=True) or {}
    if not all_gather_objects(bool(result))[0]:
        reused = all_gather_objects(baselines(first) if first and settings.baselines else None)[0]
        result = measure_one(world, encoder, sets, settings, reused=reused, out=out, say=say)
    return result, str(path.with_suffix(".html").absolute())


def _stored(path: Path, encoder: Encoder, sets: Sets, settings: Settings) -> Result:
    """Return the result at `path`; {} where a new one could differ."""
    with suppress(DamagedError, OSError):  # `measure` says what is wrong
        if result := read_result(path):
            changed = difference(result, settings, encoder=file_digest(file_of(encoder)), **sets.digests)
            same = not isinstance(encoder, Foreign) or result.get("command") == command_of(encoder, sets, settings)
            rows = (row for part in result["protocols"].values() for row in part["results"].values())
            return result if same and not changed and all("right" in row for row in rows) else {}
    return {}


def _side_by_side(results: dict[str, Result], settings: Settings) -> dict[str, Any]:
    """Return top-1 by name, with interval and deviation, and the verdicts. The first encoder's baselines stand behind it."""
    top1, verdicts, (ours, *others) = {}, [], results
    for protocol, _, _ in settings.measured:  # a stored result may have more
        part = results[ours]["protocols"][protocol]
        every = {ours: part["results"][TRAINED]}
        every |= {"its network, untrained": part["results"].get(UNTRAINED), "raw pixels": part["results"].get(RAW_PIXELS)}
        every |= {name: results[name]["protocols"][protocol]["results"][TRAINED] for name in others}
        rows = {name: row for name, row in every.items() if row}
        top1[protocol] = {name: [row["top1"], *row["interval"], *deviation(row)] for name, row in rows.items()}
        verdicts += [_verdict(protocol, name, rows[ours], row) for name, row in rows.items() if name != ours]
    return {"encoders": {name: one["encoder"] for name, one in results.items()}, "top1": top1, "verdicts": verdicts}


def _verdict(protocol: str, rival: str, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Say whether ours is above a rival, how much, and how surely."""
    paired = paired_difference(ours["right"], theirs["right"])
    (low, high), differing = paired["interval"], paired["better"] + paired["worse"]
    interval = f"interval {low:.1f} to {high:.1f}"
    if (low > 0 or high < 0) and differing >= _FEWEST:
        words = f"{abs(paired['points']):.1f} points {'above' if low > 0 else 'below'} {rival}, {interval}"
    else:
        few = f"; only {differing} images have different answers" if differing < _FEWEST else ""
        words = f"not above {rival}: {paired['points']:+.1f} points, {interval}{few}"
    return {"protocol": protocol, "rival": rival, **paired, "verdict": f"{title(protocol)}: {words}"}


def comparison_table(comparison: Result) -> str:
    """Format top-1 % of all, and the verdicts."""
    top1 = comparison["top1"]
    names = dict.fromkeys(name for rows in top1.values() for name in rows)
    cells = {name: [rows.get(name, [None]) for rows in top1.values()] for name in names}
    lines = grid(list(map(title, top1)), {name: [percent(row[0], *row[3:]) for row in rows] for name, rows in cells.items()})
    verdicts = [one["verdict"] for one in comparison["verdicts"]]
    return "\n".join([*leak(comparison), counts(comparison), *lines, *verdicts, comparison["how"]])
