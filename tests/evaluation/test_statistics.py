"""Estimators against enumeration, and intervals against their definition."""

import itertools

import numpy as np
import pytest

from oprd_tune.evaluation.statistics import avg_at_k, best_at_k, bootstrap, pass_at
from oprd_tune.metrics.step import distinct_share

VERDICTS = [[True, False, False, True, False], [False] * 5, [True] * 5, [False, False, False, False, True]]


def test_the_share_of_right_verdicts_and_whether_there_is_one():
    assert avg_at_k(VERDICTS) == [0.4, 0, 1, 0.2]
    assert best_at_k(VERDICTS) == [1, 0, 1, 1]


@pytest.mark.parametrize("j", [1, 2, 3, 5])
def test_pass_at_j_is_the_mean_over_all_draws(j):
    wanted = [np.mean([any(draw) for draw in itertools.combinations(own, j)]) for own in VERDICTS]
    assert pass_at(VERDICTS, j) == pytest.approx(wanted)


def test_pass_at_one_is_the_average_and_at_k_the_best():
    assert pass_at(VERDICTS, 1) == pytest.approx(avg_at_k(VERDICTS))
    assert pass_at(VERDICTS, 5) == best_at_k(VERDICTS)
    with pytest.raises(ValueError, match="pass@6 needs 6 verdicts"):
        pass_at(VERDICTS, 6)


def test_intervals_hold_95_percent_of_all_resamples():
    """Three problems have 27 resamples, all equally likely."""
    values = [0.0, 0.5, 1.0]
    means = sorted(np.mean(draw) for draw in itertools.product(values, repeat=3))
    found = bootstrap(values, resamples=50_000)
    assert found.value == 0.5
    low, high = np.quantile(means, [0.025, 0.975], method="inverted_cdf")
    assert (found.low, found.high) == (low, high)
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    generator = np.random.default_rng(0)
    samples = generator.random((200, 80)) < 0.3
    found = [bootstrap(sample.astype(float).tolist(), resamples=400) for sample in samples]
    assert 0.88 <= np.mean([one.low <= 0.3 <= one.high for one in found]) <= 0.99


def test_equal_values_leave_no_doubt_and_none_is_an_error():
    assert (bootstrap([0.25] * 7).low, bootstrap([0.25] * 7).high) == (0.25, 0.25)
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap([])


def test_distinct_share():
    assert distinct_share([1, 2, 3, 4, 5]) == 1
    assert distinct_share([7] * 8) == 1 / 5
    assert distinct_share([1, 2, 3]) is None
