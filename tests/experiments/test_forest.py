"""The forest plot: where an interval is drawn, and its numbers."""

import pytest

from experiments.harness import forest, protocol


def part(value=3.0, low=2.5, high=3.6, threshold=2.0, kind="ratio", side="above", verdict=protocol.HOLDS):
    return protocol.Decided("p", "effect", kind, value, low, high, 0.95, 10, threshold, side, "s", "", verdict, "")


def places(*parts):
    on = forest.scale(parts)
    return [forest.place(each, on) for each in parts]


@pytest.mark.parametrize("side", ["above", "below"])
def test_ratios_have_one_logarithmic_scale_with_the_claims_side_to_the_right(side):
    sign = 1 if side == "above" else -1
    (found,) = places(part(4.0, 1.0, 16.0, 2.0, side=side))
    assert forest.scale([part(side=side)]).labels == ("", "")
    assert found.value == pytest.approx(sign / 3)  # twice the threshold, of 8 times at the end
    assert (found.low, found.high) == pytest.approx((-1 / 3, 1) if side == "above" else (-1, 1 / 3))


def test_differences_and_ratios_near_their_threshold_have_scales_of_their_own():
    difference = part(0.01, -0.002, 0.022, 0.0, "difference")
    assert forest.scale([difference]).labels == ("\N{MINUS SIGN}0.05", "+0.05")
    assert forest.scale([difference._replace(side="below")]).labels == ("+0.05", "\N{MINUS SIGN}0.05")
    assert places(difference)[0] == pytest.approx((0.2, -0.04, 0.44))
    near = part(1.03, 1.02, 1.04, 1.05)
    assert forest.scale([near]).labels == ("÷1.05", "\N{MULTIPLICATION SIGN}1.05")
    assert -1 < places(near)[0].low < places(near)[0].high < 0


def test_a_part_on_several_data_sets_has_one_scale():
    near, far = part(1.03, 1.02, 1.04, 1.05), part(1.5, 1.4, 1.6, 1.05)
    assert forest.scale([near, far]) == forest.scale([far])
    unmeasured = near._replace(value=None, low=None, high=None, verdict=protocol.UNDECIDED)
    assert forest.scale([near, unmeasured]) == forest.scale([near])
    assert places(unmeasured) == [None]
    twice = forest.lines([part(0.01, 0.0, 0.02, 0.0, "difference")] * 2)
    assert ["+0.05" in line for line in twice] == [False, True]


def test_marks_differ_by_verdict_and_arrows_say_that_an_interval_goes_on():
    holds, refuted, undecided = (
        str(forest.lines([part(verdict=verdict)])[0])
        for verdict in (protocol.HOLDS, protocol.REFUTED, protocol.UNDECIDED)
    )
    marks = {text[text.index('<path d="') :].partition("/>")[0] for text in (holds, refuted, undecided)}
    assert len(marks) == 3
    assert 'aria-label="holds: 3.00 [2.50, 3.60], claimed &gt; 2"' in holds
    beyond = str(forest.lines([part(40.0, 3.0, 500.0)])[0])
    assert beyond.count('class="mark"') == 1  # only the arrow
    assert beyond.count('class="interval"') == 1
    assert str(forest.lines([part(40.0, 0.01, 500.0)])[0]).count('class="mark"') == 2
    unmeasured = part(None, None, None, verdict=protocol.UNDECIDED)
    assert 'class="mark"' not in str(forest.lines([unmeasured])[0])


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (part(2.7183, 2.5, 2.95), "2.72 [2.50, 2.95]"),
        (part(1.0003, 1.0001, 1.0005), "1.00030 [1.00010, 1.00050]"),
        (part(245.2, 232.1, 258.3), "245 [232, 258]"),
        (part(1.5, 0.002, 40.0), "1.5 [0.0020, 40.0]"),
        (part(-0.0001, -0.02, 0.0198, kind="difference"), "0.000 [-0.020, 0.020]"),
        (part(1.2e-6, 1.1e-6, 1.3e-6), "1.2e-06 [1.1e-06, 1.3e-06]"),
        (part(2.0, 2.0, 2.0), "2.0 [2.0, 2.0]"),
        (part(0.0, 0.0, 0.0, kind="difference"), "0 [0, 0]"),
        (part(5.0, 5.0, 5.0, kind="difference"), "5.0 [5.0, 5.0]"),
        (part(None, None, None), "not measured"),
    ],
)
def test_numbers_have_two_digits_of_the_half_width(found, text):
    assert forest.numbers(found).replace("\N{MINUS SIGN}", "-") == text
