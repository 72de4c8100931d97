"""Killed runs end as if nobody had killed them. `tests/kill_runs.py` kills many more."""

import os
import random

import pytest

from tests.kill_runs import live, shares

SHARES = shares(4)
MARKS = dict.fromkeys(("two ranks", "bridge", "math_eval"), pytest.mark.long)


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, marks=MARKS.get(case, ())) for case in SHARES])
def test_a_killed_run_ends_as_if_nobody_had_killed_it(case, tmp_path):
    """`KILL_SEED=N` repeats the instants of a run of this test, as far as a clock can."""
    seed = int(os.environ.get("KILL_SEED") or random.randrange(10**6))
    life = live(case, SHARES[case], seed=seed, folder=tmp_path)
    assert not life.faults, "\n".join([f"KILL_SEED={seed}, after kills at {life.kills}", *life.faults])
    assert len(life.kills) == SHARES[case]
