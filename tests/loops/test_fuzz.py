"""Whatever happens on whichever rank, all ranks end: none waits for another for ever."""

from __future__ import annotations

import os

import pytest

from tests.loops.fuzzed import Pool, Schedule, describe, what_is_wrong


def fuzz(first: int, count: int) -> None:
    failures = []
    with Pool() as pool:
        for seed in range(first, first + count):
            schedule = Schedule.drawn(seed)
            reports = pool.run(schedule)
            wrong = what_is_wrong(schedule, reports)
            if wrong is not None:
                failures.append(describe(schedule, wrong, reports))
                if len(failures) == 5:
                    break
    assert not failures, f"{len(failures)} of {seed + 1 - first} schedules failed\n" + "\n\n".join(failures)


@pytest.mark.timeout(900)
def test_two_dozen_schedules_end():
    fuzz(0, 24)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_thousand_schedules_end():
    first = int(os.environ.get("LEVIN_FUZZ_SEED", 1000))
    print(f"seeds from {first} on")
    fuzz(first, int(os.environ.get("LEVIN_FUZZ_COUNT", 1000)))
