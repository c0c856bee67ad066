"""The number of a claim in words: that it says what was measured, and never the opposite."""

import re

import pytest

from experiments.__main__ import STUDIES
from experiments.harness import headline, protocol


def part(value, effect="steps to a target, plain / batch normalization, at the same rate", kind="ratio"):
    return protocol.Decided("p", effect, kind, value, 0.1, 9.0, 0.95, 10, 1.0, "above", "s", "", "holds", "")


STEPS = headline.Headline("p", "{} steps with batch normalization", "batch normalization")
PLAIN = headline.Headline("p", "{} steps without", "plain")
GAIN = headline.Headline("p", "{} accuracy", "new", "height")


@pytest.mark.parametrize(
    ("said", "found", "words"),
    [
        (STEPS, part(14.53), "15 times fewer steps with batch normalization"),
        (STEPS, part(1 / 14.53), "15 times more steps with batch normalization"),
        (STEPS, part(1.25), "20% fewer steps with batch normalization"),  # 80 steps for 100
        (STEPS, part(0.8), "25% more steps with batch normalization"),  # 100 steps for 80
        (STEPS, part(1.0), "neither more nor fewer steps with batch normalization"),
        (STEPS, part(None), "not measured"),
        (PLAIN, part(14.53), "15 times more steps without"),
        (PLAIN, part(1.25), "25% more steps without"),
        (GAIN, part(0.0476, "accuracy, new - old", "difference"), "0.048 higher accuracy"),
        (GAIN, part(0.0476, "accuracy, old - new", "difference"), "0.048 lower accuracy"),
        (GAIN, part(0.0, "accuracy, old - new", "difference"), "neither higher nor lower accuracy"),
        (headline.Headline("p", "{} decades"), part(4.18, "decades", "difference"), "4.2 decades"),
    ],
)
def test_words_say_the_number_and_its_direction(said, found, words):
    assert headline.say(said, found) == words


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "0"),
        (0.0476, "0.048"),
        (0.999, "1.0"),
        (9.96, "10"),
        (14.53, "15"),
        (-4.5, "-4.5"),
        (7768433.0, "7,800,000"),
        (5.7e-7, "5.7 \N{MULTIPLICATION SIGN} 10⁻⁷"),
        (9.99e12, "1.0 \N{MULTIPLICATION SIGN} 10¹³"),
    ],
)
def test_numbers_have_two_digits(number, words):
    assert headline.rounded(number).replace("\N{SUPERSCRIPT MINUS}", "⁻") == words


GREATER = {
    "more": True,
    "higher": True,
    "larger": True,
    "fewer": False,
    "less": False,
    "lower": False,
    "smaller": False,
}


def read(words):
    """How many times as much of it the subject has, or how much more, from the words."""
    number, percent, greater = re.search(
        r"([\d.,]+)(%| times)? (more|higher|larger|fewer|less|lower|smaller)\b", words
    ).groups()
    number = float(number.replace(",", ""))
    if percent == "%":
        return 1 + number / 100 if GREATER[greater] else 1 - number / 100
    if percent:
        return number if GREATER[greater] else 1 / number
    return number if GREATER[greater] else -number


@pytest.mark.parametrize("value", [0.002, 0.31, 0.49, 0.62, 0.87, 0.996, 1.004, 1.17, 1.9, 2.2, 14.5, 640.0])
@pytest.mark.parametrize("kind", STUDIES, ids=lambda kind: kind.NAME)
def test_the_words_of_every_claim_tell_the_effect_back(kind, value):
    """Whatever a measurement finds. The effect's text is divided at its operator here, independently of the module."""
    (headed,) = (part for part in kind.PARTS if part.name == kind.HEADLINE.part)
    found = part(value, headed.effect, headed.kind)._replace(name=headed.name)
    words, subject = headline.say(kind.HEADLINE, found), kind.HEADLINE.subject
    if not subject:
        assert headline.rounded(value) in words
        assert not {*GREATER} & {*words.split()}
        return
    before, after = headed.effect.split(" / " if headed.kind == "ratio" else " - ")
    assert before.endswith(subject) != after.startswith(subject)
    told = read(words)
    if headed.kind == "difference":
        assert (told if before.endswith(subject) else -told) == pytest.approx(value, rel=0.05)
        negative = headline.say(kind.HEADLINE, found._replace(value=-value))
        assert read(negative) == -told
    else:
        expected = value if before.endswith(subject) else 1 / value
        assert told == pytest.approx(expected, rel=0.06)
        assert (told > 1) == (expected > 1)


@pytest.mark.parametrize(
    ("said", "effect", "message"),
    [
        (STEPS._replace(subject="ghost"), "plain / batch normalization", "has 'ghost' on no side"),
        (STEPS._replace(subject="plain"), "plain / plain", "has 'plain' on both sides"),
        (STEPS._replace(subject="batch"), "plain / batch_of_2", "on no side"),
        (STEPS, "plain - batch normalization", "on no side"),  # a ratio's effect has a slash
        (STEPS._replace(words="fewer steps"), "plain / batch normalization", r"one \{\} in the words"),
        (STEPS._replace(part="q"), "plain / batch normalization", "expected its name"),
    ],
)
def test_check_rejects_what_has_no_direction_or_no_place(said, effect, message):
    with pytest.raises(ValueError, match=message):
        headline.check(said, part(2.0, effect))
