"""Decisions on parts: against SciPy's tests, and their errors over many claims that are looked at again and again."""

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.stats

from experiments.harness import protocol
from experiments.harness.protocol import (
    HOLDS,
    IN_PART,
    LEAST_SEEDS,
    LOOKS,
    NO_EFFECT,
    NO_EFFECT_FROM,
    REFUTED,
    REFUTED_IN_PART,
    SPENT,
    UNDECIDED,
)


def part(name="speed", threshold=1.0, **options):
    return protocol.Part(name, "a / b", threshold, "more", **options)


def decided(values, remark="", **options):
    """The decision on only one part."""
    (found,) = protocol.decide([part(**options)], {"speed": np.asarray(values, float)}, {"speed": remark})
    return found


def by_hand(each, values, parts):
    """Effect, interval, level, seeds and verdict, from `scipy.stats.ttest_1samp` at each look."""
    back, scale = (np.exp, np.log) if each.kind == "ratio" else (np.asarray, np.asarray)
    for seeds, share in zip((10, 20, 30, 40), (1 / 2, 1 / 6, 1 / 6, 1 / 6), strict=True):
        if seeds > len(values):
            break
        error, used = 0.05 * share / parts, scale(values[:seeds])
        test = scipy.stats.ttest_1samp(used, scale(each.threshold))
        low, high = test.confidence_interval(1 - error)
        verdict = UNDECIDED
        if test.pvalue < error:
            verdict = HOLDS if (test.statistic > 0) == (each.side == "above") else REFUTED
        elif each.margin is not None and seeds >= 20:
            margin = scale(each.margin.size)
            sides = (
                scipy.stats.ttest_1samp(used, end, alternative=side).pvalue
                for end, side in ((-margin, "greater"), (margin, "less"))
            )
            verdict = NO_EFFECT if max(sides) < error / 2 else UNDECIDED
        found = (*back(np.array([used.mean(), low, high])), 1 - error), seeds, verdict
        if verdict != UNDECIDED:
            break
    return found


@pytest.mark.parametrize("seeds", [10, 19, 20, 25, 30, 40, 47])
def test_decide_matches_scipys_tests_at_each_look(seeds):
    rng = np.random.default_rng(seeds)
    parts, effects = [], {}
    for i in range(24):
        kind, side = rng.choice(["ratio", "difference"]), rng.choice(["above", "below"])
        equal, margin = (1.0, 1.3) if kind == "ratio" else (0.0, 0.3)
        threshold = rng.choice([equal, 2.0])
        margin = protocol.Margin(margin, "enough") if threshold == equal else None
        parts.append(part(f"part {i}", threshold, kind=kind, side=side, margin=margin))
        values = rng.normal(rng.choice([0, 0, 0.1, 0.3, 0.8]) * rng.choice([-1, 1]), rng.choice([0.1, 0.3]), seeds)
        effects[f"part {i}"] = threshold * np.exp(values) if kind == "ratio" else threshold + values
    found = protocol.decide(parts, effects)
    assert [each.name for each in found] == [each.name for each in parts]
    for each, mine in zip(parts, found, strict=True):
        numbers, n, verdict = by_hand(each, effects[each.name], len(parts))
        np.testing.assert_allclose([mine.value, mine.low, mine.high, mine.level], numbers, rtol=1e-6)
        assert (mine.verdict, mine.n, mine.remark) == (verdict, n, "")
        assert (mine.margin, mine.margin_source) == ((None, "") if each.margin is None else each.margin)
    kinds = {each.verdict for each in found}
    assert kinds == {HOLDS, REFUTED, UNDECIDED, *([NO_EFFECT] if seeds >= 20 else [])}


def test_a_decision_by_hand():
    """The t quantiles lie between those of printed tables: for 9 degrees of freedom 2.262 at 97.5% and 2.821 at 99%."""
    values = np.resize([0.8, 1.2], 10)  # deviation 0.2 sqrt(10 / 9), standard error 0.2 / 3
    found = decided(values, threshold=0.0, kind="difference")
    assert found.level == 0.975
    np.testing.assert_allclose(found.high - found.value, scipy.stats.t.ppf(0.9875, 9) * 0.2 / 3)
    assert 2.262 * 0.2 / 3 < found.high - found.value < 2.821 * 0.2 / 3
    assert found.verdict == HOLDS
    found = decided(np.resize([-0.2, 0.2], 20), kind="difference", threshold=0.0)
    assert (found.level, found.verdict) == (1 - 0.05 / 6, UNDECIDED)
    assert 2.861 * 0.2 / math.sqrt(19) < found.high < 3.174 * 0.2 / math.sqrt(19)  # 19: 99.5% and 99.75%
    for size, verdict in ((0.14, NO_EFFECT), (0.13, UNDECIDED)):
        margin = protocol.Margin(size, "")
        assert decided(np.resize([-0.2, 0.2], 20), kind="difference", threshold=0.0, margin=margin).verdict == verdict


def test_the_looks_spend_the_whole_error():
    assert len(LOOKS) == len(SPENT)
    assert sum(SPENT) == pytest.approx(1)
    assert [protocol.next_look(seeds) for seeds in (2, 10, 25, 39, 40, 100)] == [10, 20, 30, 40, None, None]


def wrongly_decided(effects, truth, margin, threshold=0.0, correlation=0.0, claims=4000, parts=8, error=1.0):
    """How many claims have a wrongly decided part at any look, by the protocol's numbers, vectorized.

    Each part is normal with the mean `truth` and the deviation `effects`; its parts share a share of their noise.
    Looks are nested, so that they are correlated. All seeds up to the last look are drawn.
    """
    rng = np.random.default_rng(7)
    shared = rng.normal(size=(claims, 1, LOOKS[-1]))
    own = rng.normal(size=(claims, parts, LOOKS[-1]))
    values = truth + effects * (math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own)
    undecided, wrong = np.ones((claims, parts), bool), np.zeros((claims, parts), bool)
    for seeds, share in zip(LOOKS, SPENT, strict=True):
        used = values[..., :seeds]
        mean = used.mean(-1)
        t = scipy.stats.t.ppf(1 - error * protocol.ERROR * share / parts / 2, seeds - 1)
        half = t * used.std(-1, ddof=1) / math.sqrt(seeds)
        above, below = mean - half > threshold, mean + half < threshold
        equal = ~above & ~below & (np.abs(mean) + half < margin) & (seeds >= NO_EFFECT_FROM)
        false = above & (truth <= threshold) | below & (truth >= threshold) | equal & (abs(truth) >= margin)
        wrong |= undecided & false
        undecided &= ~(above | below | equal)
    return int(wrong.any(1).sum()), values, wrong


@pytest.mark.parametrize("correlation", [0.0, 0.7])
@pytest.mark.parametrize("parts", [1, 8])
@pytest.mark.parametrize("deviation", [0.05, 0.13, 0.16, 0.2, 0.3, 1.0])
@pytest.mark.parametrize("truth", [0.0, 0.1, -0.1])
def test_a_claim_has_a_wrongly_decided_part_in_5_percent_of_the_cases_at_most(truth, deviation, parts, correlation):
    """Effects exactly at the threshold, where each direction is wrong, or at the margin, where no effect and the other
    direction are, in all looks together. Deviations from far more precise than the margin to far less."""
    claims = 4000
    wrong, *_ = wrongly_decided(deviation, truth, 0.1, correlation=correlation, claims=claims, parts=parts)
    assert wrong <= scipy.stats.binom.ppf(0.9999, claims, protocol.ERROR)
    if truth == 0 and parts == 1:
        assert wrong > 0.015 * claims  # nested looks waste a part of the error, but not most of it


def test_holms_order_with_no_effect_would_be_wrong_in_a_third_of_the_claims():
    """Why `decide` does not use it: eight parts without any effect, measured precisely, at one look."""
    rng, parts, margin = np.random.default_rng(0), 8, 10.0  # in standard errors
    distance = np.abs(rng.normal(size=(4000, parts)))
    against, equal = (2 * scipy.stats.norm.sf(each) for each in (distance, margin - distance))
    order = np.argsort(np.minimum(against, equal), 1)
    against, equal = (np.take_along_axis(each, order, 1) for each in (against, equal))
    error = protocol.ERROR / np.arange(parts, 0, -1)
    rejected = np.logical_and.accumulate(np.minimum(against, equal) <= error, 1)
    wrong = (rejected & (against <= error)).any(1).mean()
    assert 0.30 < wrong < 0.37


def test_the_simulated_rule_is_that_of_decide():
    each = [part(f"part {i}", 0.0, kind="difference", margin=protocol.Margin(0.1, "")) for i in range(3)]
    for truth, deviation in ((0.0, 0.1), (0.1, 0.15), (0.0, 0.3)):
        _, values, wrong = wrongly_decided(deviation, truth, 0.1, claims=60, parts=3, error=20)
        assert wrong.any()
        for claim, expected in zip(values, wrong, strict=True):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(protocol, "ERROR", 20 * protocol.ERROR)
                found = protocol.decide(each, {e.name: v for e, v in zip(each, claim, strict=True)})
            false = {HOLDS} if truth == 0 else set()
            false |= {REFUTED} | ({NO_EFFECT} if truth else set())
            assert [one.verdict in false for one in found] == [*expected]


def test_an_interval_covers_the_mean_as_often_as_its_level_says():
    rng, measurements = np.random.default_rng(2), 2000
    covered = 0
    for values in np.exp(rng.normal(0.7, 0.4, (measurements, 10))):
        found = decided(values)
        covered += found.low <= math.exp(0.7) <= found.high
    low, high = scipy.stats.binom.ppf([0.001, 0.999], measurements, 0.975)
    assert low <= covered <= high


effects = st.lists(st.floats(-3, 3).map(lambda x: round(x, 2)), min_size=41, max_size=41)


@hypothesis.given(effects, st.floats(-1, 1), st.floats(0.01, 1), st.sampled_from(["ratio", "difference"]))
@hypothesis.settings(max_examples=60, deadline=None)
def test_a_decision_never_changes_when_seeds_are_added(values, shift, spread, kind):
    values = shift + spread * np.array(values)
    values, threshold, size = (np.exp(values), 1.0, 1.5) if kind == "ratio" else (values, 0.0, 0.4)
    before = None
    for seeds in range(2, 42):
        now = decided(values[:seeds], threshold=threshold, kind=kind, margin=protocol.Margin(size, ""))
        if before is not None and before.verdict != UNDECIDED:
            assert now == before
        if seeds >= LEAST_SEEDS:
            assert now.n in LOOKS
            assert now == decided(values[: max(look for look in LOOKS if look <= seeds)], threshold=threshold,
                                  kind=kind, margin=protocol.Margin(size, ""))  # fmt: skip
        before = now


def test_other_parts_do_not_enter_a_decision_but_by_their_number():
    rng = np.random.default_rng(4)
    parts = [part(f"part {i}", margin=protocol.TENTH) for i in range(3)]
    values = {each.name: np.exp(rng.normal(0.1, 0.1, 20)) for each in parts}
    before = protocol.decide(parts, values)
    assert protocol.decide(parts, values | {"part 2": np.full(20, 9.0)})[:2] == before[:2]


def test_no_effect_needs_a_margin_and_20_seeds_and_comes_after_the_threshold():
    near = np.resize([0.99, 1.01], 40)
    assert decided(near).verdict == UNDECIDED
    assert decided(near[:10], margin=protocol.TENTH).verdict == UNDECIDED
    assert decided(near[:20], margin=protocol.TENTH).verdict == NO_EFFECT
    assert decided(np.resize([1.04, 1.06], 20), margin=protocol.TENTH).verdict == HOLDS  # within the margin as well
    assert decided(np.resize([0.94, 0.96], 20), margin=protocol.TENTH).verdict == REFUTED
    assert decided(np.ones(20), margin=protocol.TENTH).verdict == NO_EFFECT  # all seeds agree
    assert decided(np.full(20, 1.1), margin=protocol.TENTH, threshold=1.1).verdict == UNDECIDED


@pytest.mark.parametrize(("kind", "size"), [("ratio", 1.0), ("ratio", 0.9), ("difference", 0.0)])
def test_decide_rejects_a_margin_that_is_no_range(kind, size):
    with pytest.raises(ValueError, match=rf"the margin of 'speed' has the size {size}. Expected a range"):
        decided(np.ones(10), kind=kind, margin=protocol.Margin(size, ""))


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


@pytest.mark.parametrize(
    ("values", "remark", "expected"),
    [
        (np.resize([0.5, 2], 10), "", True),
        (np.resize([0.5, 2], 3), "", True),
        (np.full(10, 2.0), "", False),  # it holds
        (np.resize([0.5, np.nan], 10), "", False),
        (np.resize([0.5, 2], 10), "at the edge", False),
    ],
)
def test_more_seeds_may_decide_what_only_its_interval_leaves_undecided(values, remark, expected):
    assert protocol.may_be_decided(decided(values, remark)) == expected


def with_moments(seeds, mean, deviation):
    """Values whose sample mean and standard deviation are exactly these."""
    values = np.random.default_rng(0).normal(size=seeds)
    return mean + deviation * (values - values.mean()) / values.std(ddof=1)


@pytest.mark.parametrize(
    ("mean", "deviation", "kind", "verdict"),
    [
        (0.3, 0.4, "ratio", HOLDS),
        (-0.3, 0.6, "ratio", REFUTED),
        (0.0, 0.3, "ratio", NO_EFFECT),
        (0.2, 0.5, "difference", HOLDS),
        (0.005, 0.05, "difference", NO_EFFECT),
    ],
)
@pytest.mark.parametrize("measured", [10, 20, 40])
def test_what_would_decide_a_part_is_the_first_number_of_seeds_that_does(mean, deviation, kind, verdict, measured):
    ratio = kind == "ratio"
    size, threshold = (1.3, 1.0) if ratio else (0.03, 0.0)
    each = {"kind": kind, "threshold": threshold, "margin": protocol.Margin(size, "an example")}

    def look(seeds, share):
        values = with_moments(seeds, mean, deviation)
        return protocol._look(part(**each), np.exp(values) if ratio else values, share * 0.05, "")

    now = look(measured, SPENT[LOOKS.index(measured)])
    if now.verdict != UNDECIDED:
        assert protocol.would_decide(now) == ""
        return
    seeds, _, words = protocol.would_decide(now).removesuffix(")").partition(" seeds with this mean and spread (")
    number = int(seeds.removeprefix("about "))
    assert (number in LOOKS) == (not seeds.startswith("about"))
    assert number < 100  # so that it is not rounded
    assert look(number, SPENT[-1]).verdict == words == verdict
    before = [number - 1] if number > 40 else [each for each in LOOKS if measured < each < number]
    assert {look(seeds, SPENT[-1]).verdict for seeds in before} <= {UNDECIDED}


def test_what_would_decide_a_part_that_seeds_cannot_decide():
    edge = protocol.would_decide(
        decided(with_moments(10, 2.0, 0.1), remark="the rate is at the edge", kind="difference")
    )
    assert edge == "a design in which this does not occur: the rate is at the edge"
    nothing = decided(with_moments(10, 1e-6, 1.0), kind="difference", threshold=0.0)
    assert protocol.would_decide(nothing) == "more than 1000 seeds with this mean and spread"
    assert protocol.would_decide(decided([1.0, 2.0], kind="difference")) == "10 seeds or more"
    assert protocol.would_decide(decided(with_moments(10, 5.0, 0.1), kind="difference")) == ""


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
        ([HOLDS, REFUTED], IN_PART),
        ([HOLDS, UNDECIDED], IN_PART),
        ([HOLDS, NO_EFFECT], IN_PART),
        ([REFUTED, UNDECIDED], REFUTED_IN_PART),
        ([REFUTED, NO_EFFECT], REFUTED),
        ([NO_EFFECT, UNDECIDED], REFUTED_IN_PART),
        ([REFUTED, NO_EFFECT, UNDECIDED], REFUTED_IN_PART),
    ],
)
def test_the_verdict_on_a_claim_follows_from_its_parts(parts, verdict):
    assert verdict_on(parts) == verdict_on(parts[::-1]) == verdict_on(parts * 2) == verdict


def verdict_on(parts):
    return protocol.verdict([decided([2, 2.1])._replace(verdict=each) for each in parts])


@pytest.mark.parametrize("parts", itertools.product((HOLDS, REFUTED, UNDECIDED, NO_EFFECT), repeat=3))
def test_the_verdict_on_a_claim_is_that_of_its_parts_or_between_them(parts):
    found = verdict_on(parts)
    assert found in protocol.VERDICTS
    assert (found == IN_PART) == (HOLDS in parts and len({*parts}) > 1)
    for each in (HOLDS, NO_EFFECT, UNDECIDED):
        assert (found == each) == ({*parts} == {each})
    contradicted = HOLDS not in parts and bool({REFUTED, NO_EFFECT} & {*parts})
    assert (found in (REFUTED, REFUTED_IN_PART, NO_EFFECT)) == contradicted
    assert (found == REFUTED_IN_PART) == (contradicted and UNDECIDED in parts)
