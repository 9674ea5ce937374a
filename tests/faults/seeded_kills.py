"""kill -9 of a whole run at seeded moments, and on with it, until it is done."""

import random
from pathlib import Path

import training_runs as runs
from simclr_dist.run.claim import heartbeat


def killed_again_and_again(folder: Path, world_size: int, *, kills: int, seed: int) -> dict[str, int]:
    """Run `folder`/config.yaml to its end on `world_size` ranks, killed `kills` times on the way.

    The moments lie in the start-up as well as in and between steps. Returns `kills`, those that came before the run's end;
    `starts`, those of them that had begun to train, and the last one; and `most_lost`, the most steps that a kill has cost.
    """
    moments = random.Random(seed)
    killed = sum(_killed_once(folder, world_size, moments) for _ in range(kills))
    runs.train(folder, world_size)
    starts = runs.events(folder / "run", "start")
    return {"kills": killed, "starts": len(starts), "most_lost": max(entry["steps_lost"] for entry in starts)}


def _killed_once(folder: Path, world_size: int, moments: random.Random) -> bool:
    """Whether the run was killed before its end."""
    run, in_start_up = folder / "run", moments.random() < 0.25
    before, steps, pause = heartbeat(run).get("generation", 0), moments.randint(1, 8), moments.uniform(0, 1)
    with runs.started(folder, world_size) as ranks:
        if in_start_up:
            ranks.wait(2 * pause)
        else:
            runs.until(lambda: _has_made(run, before, steps) or ranks.wait(0) != [None] * world_size)
            ranks.wait(0.1 * pause)
        if ranks.wait(0) == [0] * world_size:
            return False
        ranks.kill()
        return True


def _has_made(run: Path, before: int, steps: int) -> bool:
    """Whether a start later than the one of generation `before` has made so many steps."""
    beat, begun = heartbeat(run), runs.events(run, "start")
    return beat.get("generation", 0) > before and bool(begun) and beat["step"] >= begun[-1]["step"] + steps
