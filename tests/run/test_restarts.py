"""The one rule of starting again, as a table."""

from typing import Any

import pytest

from simclr_dist.run.restarts import MAX_IDLE_STOPS, Ended, decide, pause_seconds

STOP, CRASH, DISK = False, True, True
WAITED = (False, True)  # not a disk's, and it had come to wait


@pytest.mark.parametrize(
    ("before", "ends", "max_restarts", "again", "fruitless"),
    [
        (0, [(CRASH, 0)], 0, False, 1),
        (0, [(CRASH, 5)], 0, False, 0),  # 0 is none, whatever was saved
        (0, [(CRASH, 0)], 1, True, 1),
        (0, [(CRASH, 0), (CRASH, 0)], 1, False, 2),
        (0, [(CRASH, 5)], 1, True, 0),
        (0, [(CRASH, 5), (CRASH, 5)], 1, True, 1),
        (0, [(CRASH, 5), (CRASH, 5), (CRASH, 5)], 1, False, 2),
        (0, [(CRASH, 0), (CRASH, 0), (CRASH, 0), (CRASH, 5)], 2, True, 0),
        (7, [(CRASH, 7), (CRASH, 7), (CRASH, 8), (CRASH, 8)], 2, True, 1),
        (20, [(CRASH, 15)], 1, True, 0),  # a damaged one was passed over, and another saved
        (None, [(CRASH, 5)], 1, True, 1),  # what there was before is unknown
        (None, [(CRASH, 5), (CRASH, 5)], 1, False, 2),
        (None, [(CRASH, 0), (CRASH, 5)], 1, True, 0),
        (0, [(CRASH, 0), (STOP, 0), (CRASH, 0)], 2, True, 2),  # each kind counts for itself
        (0, [(CRASH, 0), (STOP, 0), (CRASH, 0)], 1, False, 2),
        (0, [(CRASH, 0), (STOP, 5), (CRASH, 5)], 1, True, 1),
        (0, [(CRASH, 0, DISK)], 3, False, 1),  # it would be as full a second later, and all the steps are lost again
        (0, [(CRASH, 5, DISK)], 3, True, 0),
        (0, [(CRASH, 5, DISK), (CRASH, 5, DISK)], 3, False, 1),
        (0, [(CRASH, 0), (CRASH, 0), (CRASH, 0, DISK)], 3, False, 3),
        (0, [(CRASH, 0, DISK), (CRASH, 0)], 3, True, 2),  # somebody has made room, and it crashed otherwise
        (None, [(CRASH, 5, DISK)], 3, False, 1),
        (0, [(STOP, 0)], 0, True, 1),  # `max_restarts` is of crashes
        (0, [(STOP, 0)] * MAX_IDLE_STOPS, 0, True, MAX_IDLE_STOPS),
        (0, [(STOP, 0)] * (MAX_IDLE_STOPS + 1), 99, False, MAX_IDLE_STOPS + 1),
        (0, [(STOP, 0)] * 99 + [(STOP, 5)], 0, True, 0),
        (0, [(STOP, 0, *WAITED)] * 99, 0, True, 0),  # it did what there was to do, and would wait for months
        (0, [(STOP, 0, *WAITED)] * 99 + [(STOP, 0)] * MAX_IDLE_STOPS, 0, True, MAX_IDLE_STOPS),
        (0, [(STOP, 0, *WAITED)] * 99 + [(STOP, 0)] * (MAX_IDLE_STOPS + 1), 0, False, MAX_IDLE_STOPS + 1),
        (0, [*[(STOP, 0)] * MAX_IDLE_STOPS, (STOP, 0, *WAITED)], 0, True, 0),
        (0, [*[(STOP, 0)] * MAX_IDLE_STOPS, (STOP, 0, *WAITED), (STOP, 0)], 0, True, 1),
        (0, [(CRASH, 0, *WAITED), (CRASH, 0, *WAITED)], 1, False, 2),  # a crash is one whenever it comes
        (0, [(CRASH, 0), *[(STOP, 0, *WAITED)] * 9, (CRASH, 0)], 1, False, 2),
    ],
)
def test_what_starts_again(
    before: int | None, ends: list[tuple[Any, ...]], max_restarts: int, again: bool, fruitless: int
) -> None:
    decision = decide([Ended(*end) for end in ends], max_restarts, before=before)
    assert (decision.again, decision.fruitless) == (again, fruitless)


def test_pauses_grow_to_half_a_minute() -> None:
    assert [pause_seconds(attempts) for attempts in (0, 1, 2, 3, 4, 5, 6, 5000)] == [1, 2, 4, 8, 16, 30, 30, 30]
