"""Distributions and draws against enumeration, frequencies and an independent composition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from owlore import sampling

SCORES = [0.9, 0.0, 0.3, 0.2, 0.2, 0.4]
STEEP = np.array([0.55, 0.2, 0.05, 0.05, 0.05, 0.05, 0.05])


def enumerate_sequential(p: np.ndarray, gamma: int) -> np.ndarray:
    """Inclusion probabilities by summing over every ordered draw."""
    result = np.zeros(len(p))
    for order in itertools.permutations(range(len(p)), gamma):
        probability, left = 1.0, 1.0
        for block in order:
            probability *= p[block] / left
            left -= p[block]
        result[list(order)] += probability
    return result


def test_outlier_probabilities_are_scores_over_their_sum():
    p = sampling.probabilities("outlier", 6, SCORES)
    np.testing.assert_allclose(p, np.array(SCORES) / 2.0, rtol=1e-15)


def test_reverse_gives_the_largest_probability_to_the_smallest_score():
    p = sampling.probabilities("reverse", 6, SCORES)
    np.testing.assert_allclose(sorted(p), sorted(np.array(SCORES) / 2.0))
    assert p[1] == 0.45
    assert p[0] == 0.0
    assert p[5] == 0.1


def test_depth_distributions_are_linear():
    np.testing.assert_allclose(sampling.probabilities("increase", 4), [0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(sampling.probabilities("decrease", 4), [0.4, 0.3, 0.2, 0.1])
    np.testing.assert_allclose(sampling.probabilities("uniform", 4), [0.25] * 4)


def test_weight_norm_follows_the_norms():
    p = sampling.probabilities("weight_norm", 3, weight_norms=[1.0, 2.0, 5.0])
    np.testing.assert_allclose(p, [0.125, 0.25, 0.625])


def test_floor_mixes_in_the_uniform_distribution():
    p = sampling.probabilities("outlier", 6, SCORES, floor=0.3)
    np.testing.assert_allclose(p, 0.7 * np.array(SCORES) / 2.0 + 0.05)


def squared(scores: np.ndarray) -> np.ndarray:
    return scores**2


def test_a_function_of_the_scores():
    want = np.array(SCORES) ** 2 / (np.array(SCORES) ** 2).sum()
    np.testing.assert_allclose(sampling.probabilities(squared, 6, SCORES), want)
    named = sampling.probabilities(f"{__name__}:squared", 6, SCORES)
    np.testing.assert_allclose(named, want)


@pytest.mark.parametrize(
    "returned", [[1.0], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0], [np.nan, 1.0, 1.0], 3.0]
)
def test_a_function_that_returns_no_weights_is_refused(returned):
    with pytest.raises(ValueError, match="distribution: the function must return 3"):
        sampling.probabilities(lambda scores: returned, 3)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0, 2.0], "expected 3 numbers"),
        ([1.0, -2.0, 3.0], "finite numbers >= 0"),
        ([1.0, float("nan"), 3.0], "finite numbers >= 0"),
        ([1.0, float("inf"), 3.0], "finite numbers >= 0"),
        ([0.0, 0.0, 0.0], "only zeros"),
    ],
)
def test_bad_scores_are_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        sampling.probabilities("outlier", 3, scores)


@pytest.mark.parametrize("distribution", ["outlier", "reverse"])
def test_missing_scores_name_the_command(distribution):
    with pytest.raises(ValueError, match="owlore outliers"):
        sampling.probabilities(distribution, 3)


def test_rank_follows_the_probabilities_at_the_same_sum():
    assert sampling.spread_rank(np.full(6, 1 / 6), 128) == [128] * 6
    p = np.array([0.4, 0.3, 0.2, 0.1])
    # Shares of 4 x 128: 204.8, 153.6, 102.4, 51.2.
    assert sampling.spread_rank(p, 128) == [208, 160, 96, 48]
    assert sampling.spread_rank(p, 10) == [16, 12, 8, 4]
    # A block that is hardly ever drawn keeps the smallest rank, which the others pay for.
    ranks = sampling.spread_rank(np.array([0.97, 0.01, 0.01, 0.01]), 64)
    assert ranks == [208, 16, 16, 16]
    assert sampling.spread_rank(p, 1) == [1, 1, 1, 1]


@pytest.mark.parametrize("method", ["sequential", "inclusion"])
def test_too_few_blocks_with_a_probability(method):
    p = np.array([0.5, 0.5, 0.0, 0.0])
    assert sampling.draw(p, 2, 0, 0, method) == (0, 1)
    with pytest.raises(ValueError, match="at most 2"):
        sampling.draw(p, 3, 0, 0, method)
    with pytest.raises(ValueError, match="at most 4"):
        sampling.draw(p, 5, 0, 0, method)


@pytest.mark.parametrize("gamma", [1, 2, 3, 5])
def test_sequential_inclusion_equals_enumeration(gamma):
    rng = np.random.default_rng(gamma)
    p = rng.random(6) ** 3
    p /= p.sum()
    got = sampling.inclusion_probabilities(p, gamma, "sequential")
    np.testing.assert_allclose(got, enumerate_sequential(p, gamma), rtol=1e-7)


def test_sequential_inclusion_with_rates_that_differ_by_orders_of_magnitude():
    p = np.array([1.0, 1e-3, 1e-4, 1e-4, 1e-6])
    p /= p.sum()
    got = sampling.inclusion_probabilities(p, 2, "sequential")
    np.testing.assert_allclose(got, enumerate_sequential(p, 2), rtol=1e-6)


def test_inclusion_is_proportional_up_to_the_cap():
    got = sampling.inclusion_probabilities(STEEP, 3, "inclusion")
    assert got[0] == 1.0
    assert got.sum() == pytest.approx(3.0, abs=1e-12)
    # 0.2 : 0.05 among the rest, two blocks to share: 2 * 0.2 / 0.45 and 2 * 0.05 / 0.45.
    np.testing.assert_allclose(got[1:], [0.4 / 0.45] + [0.1 / 0.45] * 5)


def test_capping_one_block_can_cap_the_next():
    got = sampling.inclusion_probabilities(np.array([0.7, 0.2, 0.04, 0.03, 0.03]), 3, "inclusion")
    np.testing.assert_allclose(got, [1.0, 1.0, 0.4, 0.3, 0.3])


@pytest.mark.parametrize("method", ["sequential", "inclusion"])
@pytest.mark.parametrize(
    "p",
    [
        np.array([0.3, 0.25, 0.15, 0.1, 0.1, 0.06, 0.04]),
        # Under "inclusion" the first block of this one is capped at 1.
        STEEP,
        np.array([0.5, 0.0, 0.3, 0.1, 0.1]),
    ],
    ids=["mild", "steep", "with-zero"],
)
def test_frequencies_over_20000_draws(p, method):
    gamma, n = 3, 20_000
    counts = np.zeros(len(p))
    for index in range(n):
        drawn = sampling.draw(p, gamma, 7, index, method)
        assert len(set(drawn)) == gamma
        assert list(drawn) == sorted(drawn)
        counts[list(drawn)] += 1
    expected = (
        enumerate_sequential(p, gamma)
        if method == "sequential"
        else sampling.inclusion_probabilities(p, gamma, method)
    )
    sigma = np.sqrt(n * expected * (1 - expected))
    # Certain and impossible blocks have sigma 0: they must be met exactly.
    assert (np.abs(counts - n * expected) <= 4 * sigma + 1e-6).all(), (counts / n, expected)


@pytest.mark.parametrize("method", ["sequential", "inclusion"])
def test_every_set_of_blocks_can_come(method):
    # Systematic sampling without the shuffle would give only two of these twenty sets.
    p = np.full(6, 1 / 6)
    drawn = {sampling.draw(p, 3, 0, index, method) for index in range(1000)}
    assert drawn == set(itertools.combinations(range(6), 3))


@pytest.mark.parametrize("method", ["sequential", "inclusion"])
def test_a_draw_is_a_pure_function_of_seed_and_index(method):
    first = [sampling.draw(STEEP, 3, 5, i, method) for i in range(50)]
    assert first == [sampling.draw(STEEP, 3, 5, i, method) for i in range(50)]
    assert first != [sampling.draw(STEEP, 3, 6, i, method) for i in range(50)]
    assert len(set(first)) > 5


def test_sequential_draw_equals_an_inverse_distribution_by_hand():
    for index in range(200):
        uniforms = np.random.default_rng([11, index]).random(3)
        left, chosen = dict(enumerate(STEEP)), []
        for u in uniforms:
            edges = np.cumsum(list(left.values())) / sum(left.values())
            chosen.append(list(left)[int((u >= edges).sum())])
            del left[chosen[-1]]
        assert sampling.draw(STEEP, 3, 11, index, "sequential") == tuple(sorted(chosen))


def test_published_probabilities_of_llama2_7b():
    # First blocks of the authors' file; the rest is summarised by its mean, which the inclusion
    # probabilities of the first blocks hardly see.
    p = np.array([0.123, 0.135, 0.058, 0.052, 0.045] + [0.587 / 27] * 27)
    got = sampling.inclusion_probabilities(p, 5, "sequential")
    np.testing.assert_allclose(got[:3], [0.519, 0.554, 0.290], atol=0.02)
    assert got.sum() == pytest.approx(5.0, abs=1e-9)
