"""Decisions on parts: against SciPy's test and Holm's order made by hand, and their errors over many seeded claims."""

import math

import numpy as np
import pytest
import scipy.stats

from experiments.harness import protocol
from experiments.harness.protocol import HOLDS, IN_PART, LEAST_SEEDS, REFUTED, REFUTED_IN_PART, UNDECIDED


def part(name="speed", threshold=1.0, **options):
    return protocol.Part(name, "a / b", threshold, "more", **options)


def decided(values, remark="", **options):
    """The decision on only one part."""
    (found,) = protocol.decide([part(**options)], {"speed": np.asarray(values, float)}, {"speed": remark})
    return found


def by_hand(parts, effects):
    """By name, effect, interval and verdict, from `scipy.stats.ttest_1samp` and Holm's steps."""
    tests, back, values_of = {}, {}, {}
    for each in parts:
        ratio = each.kind == "ratio"
        values_of[each.name] = values = np.log(effects[each.name]) if ratio else effects[each.name]
        tests[each.name] = scipy.stats.ttest_1samp(values, math.log(each.threshold) if ratio else each.threshold)
        back[each.name] = np.exp if ratio else np.asarray
    found, rejecting, error = {}, True, 0.0
    for place, each in enumerate(sorted(parts, key=lambda each: tests[each.name].pvalue)):
        test = tests[each.name]
        if rejecting:
            error = 0.05 / (len(parts) - place)
        rejecting = rejecting and test.pvalue <= error
        interval = test.confidence_interval(1 - error)
        above = (test.statistic > 0) == (each.side == "above")
        verdict = (HOLDS if above else REFUTED) if rejecting else UNDECIDED
        mean = values_of[each.name].mean()
        found[each.name] = (*back[each.name](np.array([mean, *interval])), 1 - error, verdict)
    return found


@pytest.mark.parametrize("seed", range(8))
def test_decide_matches_scipy_in_holms_order(seed):
    rng = np.random.default_rng(seed)
    parts, effects = [], {}
    for i in range(5):
        kind, side = rng.choice(["ratio", "difference"]), rng.choice(["above", "below"])
        parts.append(part(f"part {i}", rng.uniform(0.5, 3), kind=kind, side=side))
        values = rng.normal(rng.choice([0, 0.4, 1.5]) * rng.choice([-1, 1]), 0.5, 10)
        threshold = parts[-1].threshold
        effects[f"part {i}"] = threshold * np.exp(values) if kind == "ratio" else threshold + values
    wanted = by_hand(parts, effects)
    found = protocol.decide(parts, effects)
    assert [each.name for each in found] == [each.name for each in parts]
    for each in found:
        value, low, high, level, verdict = wanted[each.name]
        np.testing.assert_allclose([each.value, each.low, each.high, each.level], [value, low, high, level], rtol=1e-6)
        assert (each.verdict, each.n, each.remark) == (verdict, 10, "")


def test_decide_excludes_the_threshold_exactly_if_it_decides():
    rng = np.random.default_rng(1)
    parts = [part(f"part {i}", kind="difference") for i in range(4)]
    counts = {True: 0, False: 0}
    for _ in range(200):
        means = 1 + rng.choice([0, 0.5, -0.5], 4)
        effects = {each.name: rng.normal(mean, 0.6, 10) for each, mean in zip(parts, means, strict=True)}
        for each in protocol.decide(parts, effects):
            outside = not each.low <= each.threshold <= each.high
            assert outside == (each.verdict != UNDECIDED)
            assert each.verdict != (HOLDS if each.value < each.threshold else REFUTED)
            counts[outside] += 1
    assert min(counts.values()) > 100


@pytest.mark.parametrize(("parts", "seeds"), [(1, 10), (8, 10), (3, 15)])
def test_chance_decides_a_claim_in_5_percent_of_the_cases_at_most(parts, seeds):
    """All effects at their thresholds. The number of claims with any decided part has a binomial distribution."""
    rng, claims = np.random.default_rng(parts), 2000
    each = [part(f"part {i}", 1.5) for i in range(parts)]
    wrong = 0
    for values in 1.5 * np.exp(rng.normal(0, 0.3, (claims, parts, seeds))):
        found = protocol.decide(each, {e.name: v for e, v in zip(each, values, strict=True)})
        wrong += any(one.verdict != UNDECIDED for one in found)
    # With independent parts, Holm's first step fails in 1 - (1 - 0.05 / m)^m of the cases, a little below 0.05.
    expected = 1 - (1 - protocol.ERROR / parts) ** parts
    low, high = scipy.stats.binom.ppf([0.001, 0.999], claims, expected)
    assert low <= wrong <= high
    assert wrong <= scipy.stats.binom.ppf(0.999, claims, 0.05)


def test_an_interval_covers_the_mean_in_95_percent_of_the_cases():
    rng, measurements = np.random.default_rng(2), 2000
    covered = 0
    for values in np.exp(rng.normal(0.7, 0.4, (measurements, 10))):
        found = decided(values)
        covered += found.low <= math.exp(0.7) <= found.high
    low, high = scipy.stats.binom.ppf([0.001, 0.999], measurements, 0.95)
    assert low <= covered <= high


def test_a_ratio_and_its_inverse_are_treated_alike():
    values = np.exp(np.random.default_rng(3).normal(0.8, 0.3, 10))
    found, inverse = decided(values, threshold=1.2), decided(1 / values, threshold=1 / 1.2, side="below")
    np.testing.assert_allclose([found.value, found.low], [1 / inverse.value, 1 / inverse.high])
    assert found.verdict == inverse.verdict == HOLDS


@pytest.mark.parametrize(
    ("values", "options", "verdict"),
    [
        ([2, 2.1, 1.9], {}, HOLDS),
        ([2, 2.1, 1.9], {"side": "below"}, REFUTED),
        ([0.5, 0.6, 0.55], {"side": "below"}, HOLDS),
        ([0.5, 0.6, 0.55], {}, REFUTED),
        ([0.5, 2, 1], {}, UNDECIDED),
        ([-3, -3.1, -2.9], {"kind": "difference", "threshold": 0.0, "side": "below"}, HOLDS),
        ([3, 3, 3], {}, HOLDS),  # all seeds agree
        ([1, 1, 1], {}, UNDECIDED),  # and are at the threshold
        ([0.5, 0.5, 0.5], {}, REFUTED),
    ],
)
def test_a_part_is_decided_by_the_side_of_its_interval(values, options, verdict):
    assert decided(np.resize(values, 12), **options).verdict == verdict


def test_seeds_that_agree_have_an_interval_of_no_width():
    found = decided([3, 3, 3])
    np.testing.assert_allclose([found.value, found.low, found.high], 3)


@pytest.mark.parametrize(
    ("values", "n", "remark"),
    [
        ([3, np.nan, 3.1, np.inf], 2, "could not be measured in 2 of 4 seeds"),
        ([np.nan, np.nan], 0, "could not be measured in 2 of 2 seeds"),
        ([3], 1, "one seed has no spread"),
    ],
)
def test_what_cannot_be_measured_in_every_seed_is_undecided(values, n, remark):
    found = decided(values)
    assert (found.verdict, found.n, found.remark) == (UNDECIDED, n, remark)
    assert found.value is found.low is found.high is None


@pytest.mark.parametrize("seeds", [2, LEAST_SEEDS - 1])
def test_fewer_seeds_than_a_verdict_needs_decide_nothing(seeds):
    found = decided(np.linspace(2.0, 2.1, seeds))
    assert (found.verdict, found.remark) == (UNDECIDED, f"{seeds} seeds; a verdict needs {LEAST_SEEDS}")
    assert 1 < found.low < found.value < found.high
    assert decided(np.linspace(2.0, 2.1, LEAST_SEEDS)).verdict == HOLDS


def test_a_remark_leaves_a_part_undecided_with_its_interval():
    values = np.linspace(2.9, 3.1, 10)
    found, free = decided(values, remark="at the edge"), decided(values)
    assert (found.verdict, found.remark) == (UNDECIDED, "at the edge")
    assert (found.value, found.low, found.high) == (free.value, free.low, free.high)
    assert free.verdict == HOLDS


def test_parts_that_cannot_be_decided_come_last_in_holms_order():
    parts = [part("edge"), part("clear")]
    values = np.linspace(1.9, 2.2, 10)
    edge, clear = protocol.decide(parts, {"edge": values, "clear": values}, {"edge": "at the edge"})
    assert (edge.verdict, clear.verdict) == (UNDECIDED, HOLDS)
    assert clear.level == 1 - 0.05 / 2  # the number of parts counts all the same


def test_decide_rejects_a_ratio_that_is_not_positive():
    for value in (0.0, -1.0):
        with pytest.raises(
            ValueError, match=rf"decide\(\): the ratio 'speed' has the value {value}. Expected positive"
        ):
            decided([1.0, value])


@pytest.mark.parametrize("effects", [{}, {"speed": np.ones(2), "other": np.ones(2)}])
def test_decide_rejects_effects_that_do_not_fit(effects):
    with pytest.raises(ValueError, match="Expected one effect for each part"):
        protocol.decide([part()], effects)


def test_decide_rejects_two_parts_of_one_name():
    with pytest.raises(ValueError, match="Expected one effect for each part"):
        protocol.decide([part(), part()], {"speed": np.ones(2)})


@pytest.mark.parametrize(
    ("parts", "verdict"),
    [
        ([HOLDS, HOLDS], HOLDS),
        ([HOLDS, REFUTED], IN_PART),
        ([HOLDS, UNDECIDED], IN_PART),
        ([REFUTED, REFUTED], REFUTED),
        ([REFUTED, UNDECIDED], REFUTED_IN_PART),
        ([UNDECIDED, UNDECIDED], UNDECIDED),
    ],
)
def test_the_verdict_on_a_claim_follows_from_its_parts(parts, verdict):
    assert protocol.verdict([decided([2, 2.1])._replace(verdict=each) for each in parts]) == verdict
