"""Exact epochs, the same at every world size; spares that can never put an image into a batch twice."""

import time
import tracemalloc
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from simclr_dist.data import order as order_module
from simclr_dist.data.order import Plan, Rows

SIZES = np.array([40, 41, 7, 40, 40, 37])  # 205 images


class Case(NamedTuple):
    """A run's order, and every world size up to 8 that it can be read with."""

    sizes: Rows
    seed: int
    batch: int
    micro_batches: int
    window: int
    worlds: list[int]

    def plan(self, rank: int = 0, world_size: int = 1) -> Plan:
        return Plan(self.sizes, self.seed, self.batch, self.micro_batches, self.window, rank, world_size)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    micro_batches = draw(st.integers(1, 4))
    piece = draw(st.integers(1, 24))
    batch = micro_batches * piece
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=9))
    if sum(sizes) < batch:
        sizes.append(batch - sum(sizes))
    worlds = [size for size in range(1, 9) if piece % size == 0]
    seed = draw(st.sampled_from([0, 1, 12345, 2**64 - 1]))
    return Case(np.array(sizes), seed, batch, micro_batches, draw(st.integers(1, 5)), worlds)


def epoch_order(sizes: Rows, *, seed: int, epoch: int, window: int) -> Rows:
    """The whole permutation, as the first runs computed it: one draw after the other."""
    draws = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    starts = np.cumsum(sizes) - sizes
    shards = np.argsort(draws.random_raw(len(sizes)), kind="stable")
    parts = []
    for first in range(0, len(shards), window):
        rows = np.concatenate([np.arange(starts[s], starts[s] + sizes[s]) for s in shards[first : first + window]])
        parts.append(rows[np.argsort(draws.random_raw(len(rows)), kind="stable")])
    return np.concatenate(parts).astype(np.int64)


def order_of(plan: Plan, epoch: int) -> Rows:
    """The same permutation out of a plan, left-over images too."""
    return Plan(plan.shard_sizes, plan.seed, plan.samples, window=plan.window)[epoch][1]


def epoch_rows(plan: Plan, epoch: int) -> list[int]:
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    return [row for step in steps for row in plan[step][1].tolist()]


@given(cases(), st.integers(0, 3))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_an_epoch_is_exact_and_each_piece_of_a_batch_the_same_at_every_world_size(case: Case, epoch: int) -> None:
    alone = case.plan()
    seen = epoch_rows(alone, epoch)
    samples = int(case.sizes.sum())
    assert len(seen) == len(set(seen)) == samples - samples % case.batch
    assert set(seen) <= set(range(samples))
    assert alone.left_over == samples % case.batch

    plans = {size: [case.plan(rank, size) for rank in range(size)] for size in case.worlds}
    for step in range(epoch * alone.steps_per_epoch, (epoch + 1) * alone.steps_per_epoch):
        pieces = alone[step][1].reshape(case.micro_batches, -1)
        for size, ranks in plans.items():
            assert {plan[step][0] for plan in ranks} == {epoch}
            shares = [plan[step][1].reshape(case.micro_batches, -1) for plan in ranks]
            assert {share.shape for share in shares} == {(case.micro_batches, case.batch // case.micro_batches // size)}
            # In rank order even, so that ranks' rows concatenate to what one process sees.
            assert np.array_equal(np.concatenate(shares, axis=1), pieces)


@given(cases(), st.integers(0, 3))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_samples_stay_within_their_window_of_shards(case: Case, epoch: int) -> None:
    order = order_of(case.plan(), epoch)
    assert sorted(order) == list(range(case.sizes.sum()))
    shard = np.repeat(np.arange(len(case.sizes)), case.sizes)[order]
    start = 0
    while start < len(order):
        window = list(dict.fromkeys(shard[start:].tolist()))[: case.window]
        end = start + case.sizes[window].sum()
        assert set(shard[start:end]) == set(window)
        start = end


def test_shards_are_shuffled_and_samples_mixed_within_the_window() -> None:
    shard_of_row = np.repeat(np.arange(6), 20)
    shard_orders, changes = [], []
    for epoch in range(8):
        shards = shard_of_row[order_of(Plan(np.full(6, 20), 0, 20, window=1), epoch)]
        shard_orders.append(tuple(dict.fromkeys(shards.tolist())))
        changes.append(np.count_nonzero(np.diff(shard_of_row[order_of(Plan(np.full(6, 20), 0, 20, window=6), epoch)])))
    assert len(set(shard_orders)) == 8
    # 119 neighbours, each of another shard with probability 100/119.
    assert all(80 < change < 118 for change in changes)


def test_other_images_are_left_out_each_epoch_and_all_are_seen_over_a_few() -> None:
    plan = Plan(SIZES, seed=3, global_batch_size=24, window=2)
    assert (plan.samples, plan.steps_per_epoch, plan.left_over) == (205, 8, 13)
    left = [set(range(205)) - set(epoch_rows(plan, epoch)) for epoch in range(4)]
    assert [len(rows) for rows in left] == [13] * 4
    assert len({frozenset(rows) for rows in left}) == 4
    assert not set.intersection(*left)


def test_every_image_is_left_out_equally_often() -> None:
    plan = Plan(np.array([4, 1, 2, 3]), seed=0, global_batch_size=8, window=2)
    misses = np.zeros(10)
    for epoch in range(1000):
        misses[list(set(range(10)) - set(epoch_rows(plan, epoch)))] += 1
    # Left-over images come from the last window, so shards of windows that are small are hit a little more often.
    assert misses.sum() == 2000
    assert misses.min() > 120
    assert misses.max() < 320


def test_order_differs_by_seed_and_by_epoch() -> None:
    orders = [tuple(order_of(Plan(SIZES, seed, 24, window=3), epoch)) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    assert len(set(orders)) == 9


def test_equal_keys_keep_their_order() -> None:
    keys = np.random.default_rng(0).integers(0, 50, 1000).astype(np.uint64)
    assert np.array_equal(order_module._sorting(keys), np.argsort(keys, kind="stable"))
    unique = np.random.default_rng(0).permutation(1000).astype(np.uint64)
    assert np.array_equal(order_module._sorting(unique), np.argsort(unique, kind="stable"))


@given(cases(), st.lists(st.integers(0, 9), max_size=3), st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_step_has_the_rows_of_the_whole_permutation(case: Case, empty: list[int], data: st.DataObject) -> None:
    """Whatever was asked before: steps and spares of other epochs and windows. Shards may be empty."""
    case = case._replace(sizes=np.insert(case.sizes, [place % (len(case.sizes) + 1) for place in empty], 0))
    plan, orders = case.plan(), dict[int, Rows]()
    for step in data.draw(st.lists(st.integers(0, 4 * case.plan().steps_per_epoch - 1), min_size=1, max_size=6)):
        epoch, position = divmod(step, plan.steps_per_epoch)
        order = orders.setdefault(epoch, epoch_order(case.sizes, seed=case.seed, epoch=epoch, window=case.window))
        assert plan[step][1].tolist() == order[position * case.batch : (position + 1) * case.batch].tolist()
        slot = data.draw(st.integers(0, case.batch - 1))
        column = order[slot :: case.batch].tolist()
        whole = column[: plan.steps_per_epoch]
        assert [*plan.spares(step, slot)] == column[plan.steps_per_epoch :] + whole[position + 1 :] + whole[:position]
        assert len(plan._kept) <= plan._most_kept


@pytest.mark.parametrize("window", [1, 3, 16, 400])
def test_draws_are_had_without_those_before_at_any_place_in_a_block(window: int) -> None:
    """A generator makes four draws at a time: windows begin at every place among them."""
    sizes = np.random.default_rng(window).integers(0, 2000, 307)
    expected = epoch_order(sizes, seed=2**63 + 5, epoch=2**40, window=window)
    plan = Plan(sizes, 2**63 + 5, 997, window=window)
    for step in (0, 1, 100, plan.steps_per_epoch - 1):
        rows = plan[2**40 * plan.steps_per_epoch + step][1]
        assert np.array_equal(rows, expected[step * 997 : (step + 1) * 997])


def test_a_step_costs_its_own_windows_however_many_images_there_are() -> None:
    """64 million images in 64,000 shards: their permutation alone would take 500 MB."""
    plan = Plan(np.full(64_000, 1000), seed=0, global_batch_size=4096)
    tracemalloc.start()
    try:
        for step in (0, 7000, 99 * plan.steps_per_epoch + 15_000):
            plan[step], plan.shards_around(step), next(plan.spares(step, 5))
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 4 << 20
    assert peak < 8 << 20


def test_an_epoch_of_imagenet_is_planned_at_once() -> None:
    """1,281,000 samples in 1,000 shards, within a tenth of a second of CPU time."""
    plan = Plan(np.full(1000, 1281), seed=0, global_batch_size=4096, window=16)
    spent = []
    for epoch in range(5):
        start = time.process_time()
        plan[epoch * plan.steps_per_epoch]
        spent.append(time.process_time() - start)
    print(f"{min(spent) * 1000:.0f} ms of CPU time")
    assert min(spent) < 0.1
    assert np.array_equal(np.sort(order_of(plan, 4)), np.arange(1_281_000))


def test_a_step_needs_nothing_but_its_number() -> None:
    plan = Plan(SIZES, seed=5, global_batch_size=24, micro_batches=2, window=2, rank=1, world_size=3)
    forwards = [plan[step] for step in range(20)]
    for step in (19, 0, 8, 7, 19, 3):
        for again in (plan, Plan(SIZES, 5, 24, 2, 2, 1, 3)):
            epoch, rows = again[step]
            assert epoch == forwards[step][0] == step // 8
            assert np.array_equal(rows, forwards[step][1])


def test_the_random_stream_is_the_one_that_runs_were_begun_with() -> None:
    # Should these change, a run begun before could not be resumed: it would see images twice.
    sizes = np.array([3, 4, 2])
    assert order_of(Plan(sizes, 1, 4, window=2), 0).tolist() == [7, 0, 2, 1, 8, 4, 5, 3, 6]
    assert order_of(Plan(sizes, 1, 4, window=2), 1).tolist() == [7, 2, 0, 1, 8, 5, 6, 4, 3]
    assert order_of(Plan(sizes, 2**64 - 1, 4, window=1), 0).tolist() == [1, 0, 2, 8, 7, 3, 4, 5, 6]
    plan = Plan(sizes, seed=1, global_batch_size=4, micro_batches=2, window=2, rank=1, world_size=2)
    assert [(epoch, rows.tolist()) for epoch, rows in map(plan.__getitem__, range(4))] == [
        (0, [0, 1]),
        (0, [4, 3]),
        (1, [2, 1]),
        (1, [5, 4]),
    ]
    assert [*plan.spares(2, 0)] == [3, 8]
    assert [*plan.spares(2, 3)] == [4]


@given(cases(), st.integers(0, 30), st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_whatever_fails_no_image_is_in_a_batch_twice(case: Case, step: int, data: st.DataObject) -> None:
    plan = case.plan()
    _, rows = plan[step]
    columns = [[int(row), *plan.spares(step, slot)] for slot, row in enumerate(rows)]
    everything = [row for column in columns for row in column]
    assert sorted(everything) == list(range(plan.samples)), "columns are disjoint, and nothing is in none"

    unreadable = data.draw(st.sets(st.sampled_from(everything)))
    used = [next((row for row in column if row not in unreadable), None) for column in columns]
    readable = [row for row in used if row is not None]
    assert len(readable) == len(set(readable))


@pytest.mark.parametrize("step", [2, 10])
def test_the_left_over_image_stands_in_first_then_those_of_the_following_steps(step: int) -> None:
    plan = Plan(SIZES, seed=7, global_batch_size=24, window=2)
    order = order_of(plan, step // 8)
    for slot in (0, 12, 13, 23):
        spares = [*plan.spares(step, slot)]
        following = [order[24 * ((step + k) % 8) + slot] for k in range(1, 8)]
        assert spares == ([order[24 * 8 + slot]] if slot < plan.left_over else []) + following


@given(cases(), st.integers(0, 40))
@example(Case(np.array([4] * 4), 0, 4, 1, 1, [1]), 1)  # a batch is a window
@example(Case(np.array([4] * 5), 0, 16, 1, 1, [1]), 0)  # behind the last batch comes a window of left-over images
@settings(max_examples=100, deadline=None, derandomize=True)
def test_the_shards_of_a_step_are_its_windows_and_the_next(case: Case, step: int) -> None:
    plan = case.plan()
    epoch, position = divmod(step, plan.steps_per_epoch)

    def windows(epoch: int) -> list[list[int]]:
        keys = np.random.Philox(key=np.array([case.seed, epoch], dtype=np.uint64)).random_raw(len(case.sizes))
        shards = sorted(range(len(keys)), key=lambda shard: keys[shard])
        return [shards[first : first + case.window] for first in range(0, len(shards), case.window)]

    shard_of_row = np.repeat(np.arange(len(case.sizes)), case.sizes)
    rows = order_of(plan, epoch)[position * case.batch : (position + 1) * case.batch]
    own = windows(epoch)
    read = [number for number, window in enumerate(own) if set(window) & set(shard_of_row[rows].tolist())]
    now, ahead = plan.shards_around(step)
    assert now.tolist() == [shard for window in own[read[0] : read[-1] + 1] for shard in window]
    last = position + 1 == plan.steps_per_epoch or read[-1] + 1 == len(own)
    assert ahead.tolist() == (windows(epoch + 1)[0] if last else own[read[-1] + 1])
    for steps in (1, 3):
        some = {shard for following in range(step, step + steps) for shard in plan.shards_around(following)[0].tolist()}
        assert len(some) <= plan.shards_at_once(steps)


def test_the_most_shards_at_once() -> None:
    plan = Plan(np.array([10] * 9), seed=0, global_batch_size=20, window=2)
    # Windows of 20 images. One step reads two of them, ten steps all; nine shards leave a window of one.
    assert [plan.shards_at_once(steps) for steps in (1, 2, 3, 10)] == [5, 7, 9, 9]
    assert Plan(np.array([30, 10, 10, 10, 10]), seed=0, global_batch_size=20, window=2).shards_at_once(1) == 5


def test_a_plan_of_one_process_needs_three_numbers() -> None:
    plan = Plan(SIZES, 3, 24)
    assert (plan.micro_batches, plan.window, plan.rank, plan.world_size) == (1, 16, 0, 1)
    assert type(plan.samples) is int
