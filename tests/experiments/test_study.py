"""The claims: how a measurement resumes, what a folder rejects, and whether the committed verdicts follow from it."""

import base64
import datetime
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.__main__ import STUDIES, main
from experiments.harness import data, headline, lab, protocol, records, report, runs, study
from tests.support import report_page
from tests.support.browser import open_in_browser
from tests.support.page import Page

IDS = [
    "convergence",
    "activations",
    "learning-rate",
    "initialization",
    "gradients",
    "smoothness",
    "regularization",
    "noise",
    "batch-size",
    "recurrent",
    "placement",
    "cost",
    "devices",
]
RESULTS = Path(__file__).parents[2] / "experiments" / "results"


@dataclass(frozen=True)
class Weighing(study.Study):
    """A claim whose measurement takes no time."""

    NAME = "weighing"
    CLAIM = "lead is heavier than water"
    HEADLINE = headline.Headline("weight", "lead is {} heavy", "lead", "amount")
    QUESTION = "How many times as heavy is it?"
    SOURCE = "nobody"
    PROTOCOL = "Both are weighed."
    WOULD_CHANGE = "Another planet would not."
    PARTS = (protocol.Part("weight", "lead / water", 1.0, "heavier means more"),)
    SMOKE = {"seeds": 2, "scale": 3.0}
    FULL = {"seeds": 20}

    scale: float = 11.3
    """times as heavy"""

    def measure(self, lab: lab.Lab) -> None:
        for arm, factor in (("water", 1.0), ("lead", self.scale)):
            for seed in lab.record.missing([arm], lab.seeds):
                lab.record.add(arm, seed, [0], {"weight": factor * np.exp(np.random.default_rng(seed).normal(0, 0.1))})
                lab.tell(arm)

    def judge(self, metrics):
        ratio = metrics["lead"]["weight"] / metrics["water"]["weight"]
        return study.Finding({"weight": ratio}, f"{ratio.mean():.4f}", "It is heavier", [["weight"], ["much"]])

    def draw(self, path, metrics, title):
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(8) + bytes([0, 0, 1, 0, 0, 0, 1, 0]))


def weigh(tmp_path, **changes):
    study.run_all([Weighing(out=tmp_path, **changes)], [Weighing])
    (claim,) = report.read(tmp_path / "verdicts.json")
    return claim


def test_an_interrupted_measurement_goes_on_with_the_runs_that_are_missing(tmp_path, monkeypatch):
    whole = weigh(tmp_path / "whole")
    added, add = [], runs.Record.add

    def stopped(self, network, seed, *values):
        if len(added) == 14:
            raise KeyboardInterrupt
        added.append((network, seed))
        add(self, network, seed, *values)

    monkeypatch.setattr(runs.Record, "add", stopped)
    with pytest.raises(KeyboardInterrupt):
        weigh(tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "verdicts.json").exists()
    assert study.conclude(Weighing, tmp_path / "stopped") is None  # it is not complete
    with (tmp_path / "stopped" / "weighing" / "digits" / "metrics.jsonl").open("a") as file:
        file.write('{"network":"lead","se')  # as if killed while a line was written
    monkeypatch.setattr(runs.Record, "add", lambda *args: added.append(args[1:3]) or add(*args))
    assert weigh(tmp_path / "stopped") == whole
    assert added == [(arm, seed) for arm in ("water", "lead") for seed in range(2000, 2010)]
    metrics = [(tmp_path / run / "weighing" / "digits" / "metrics.jsonl").read_bytes() for run in ("whole", "stopped")]
    assert metrics[0] == metrics[1]


def test_a_complete_measurement_is_not_made_again_and_more_seeds_are_added_to_it(tmp_path, monkeypatch):
    first = weigh(tmp_path)
    added, add = [], runs.Record.add
    monkeypatch.setattr(runs.Record, "add", lambda *args: added.append(args[2]) or add(*args))
    assert weigh(tmp_path) == first
    assert added == []
    (result,) = weigh(tmp_path, seeds=12).results
    assert added == [2010, 2011] * 2
    assert (result.seeds, result.parts[0].n) == (12, 10)  # judged at the last complete look


def test_the_verdict_and_its_parts_are_those_of_the_protocol(tmp_path):
    (result,) = weigh(tmp_path).results
    ratios = np.full(10, 11.3)  # both are weighed with the same error in each seed
    (part,) = protocol.decide(Weighing.PARTS, {"weight": ratios})
    assert (result.verdict, result.dataset, result.seeds) == ("holds", "digits", 10)
    np.testing.assert_allclose(result.parts[0].value, part.value, rtol=1e-4)


def test_another_design_in_the_folder_is_refused_with_what_differs(tmp_path):
    weigh(tmp_path)
    with pytest.raises(data.InputError, match=r"results of another design \(scale: 11.3 there, 3.0 here\)"):
        weigh(tmp_path, scale=3.0)
    weigh(tmp_path, preset="full")  # a preset is nothing but its fields
    path = tmp_path / "weighing" / "digits" / "config.json"
    text = path.read_text()
    path.write_text(text.replace(json.loads(text)["dataset_sha256"], "0123"))
    with pytest.raises(data.InputError, match="dataset_sha256: 0123 there, "):
        weigh(tmp_path)
    path.write_text(text[:-9])
    with pytest.raises(data.InputError, match=r"config.json is damaged .*Delete the folder"):
        weigh(tmp_path)


def test_a_change_of_the_design_is_another_design(tmp_path, monkeypatch):
    weigh(tmp_path)
    monkeypatch.setattr(Weighing, "CHANGES", (report.Change("2026-01-31", "other scales", "1000 to 1009"),))
    with pytest.raises(data.InputError, match=r"\(changes: 0 there, 1 here\)"):
        weigh(tmp_path)


SCALES = {"water": (1, 2.5), "lead": 3}
"""A constant of numbers, as claims have them for their grids and targets."""
WORDS = ("water", "lead")


def test_a_change_of_a_constant_of_numbers_is_another_design(tmp_path, monkeypatch):
    before = weigh(tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "WORDS", ("water",))
    assert weigh(tmp_path) == before
    monkeypatch.setitem(SCALES, "water", (1, 2))
    with pytest.raises(data.InputError, match=r"\(SCALES: {'water': \[1, 2.5\], 'lead': 3} there, {'water': \[1, 2\]"):
        weigh(tmp_path)
    with pytest.raises(data.InputError, match="results of another design"):
        study.conclude(Weighing, tmp_path)


@pytest.mark.parametrize(("first", "number"), [(891, 10), (902, 10), (900, 1), (0, 1000)])
def test_seeds_that_choose_the_rates_are_refused(first, number):
    with pytest.raises(
        data.InputError, match=rf"first_seed={first}, seeds={number}: the seeds \(900, 901, 902\) choos"
    ):
        Weighing(first_seed=first, seeds=number)


@pytest.mark.parametrize(("first", "number"), [(890, 10), (903, 10), (0, 900)])
def test_other_seeds_are_not_refused(first, number):
    assert [*Weighing(first_seed=first, seeds=number).seed_numbers] == [*range(first, first + number)]


@pytest.mark.parametrize(
    ("field", "message"), [({"seeds": 0}, "seeds=0"), ({"scale": -1.0}, "scale=-1.0"), ({"first_seed": -1}, "=-1")]
)
def test_fields_out_of_range_are_refused(field, message):
    with pytest.raises(data.InputError, match=message):
        Weighing(**field)


def test_a_preset_sets_the_flags_that_are_not_given(monkeypatch, capsys):
    given = []
    monkeypatch.setattr(study, "run_one", given.append)
    assert main(["devices", "--preset", "smoke", "--steps", "3"]) == 0
    assert main(["devices", "--hidden", "7"]) == 0
    smoke, default = given
    assert (smoke.preset, smoke.steps, smoke.hidden, smoke.seeds) == ("smoke", 3, (30,), 2)
    assert (default.preset, default.hidden, default.seeds, default.first_seed) == ("default", (7,), 10, 2000)
    with pytest.raises(SystemExit, match="2"):
        main(["devices", "--preset", "large"])
    assert "smoke" in capsys.readouterr().err


def test_all_takes_some_claims_by_name(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(study, "run_all", lambda studies, kinds: asked.append(([each.NAME for each in studies], kinds)))
    assert main(["all", "--claims", "cost", "convergence"]) == 0
    assert asked == [(["convergence", "cost"], STUDIES)]
    assert main(["all", "--claims", "coffee"]) == 2
    assert "claims=coffee: expected some of convergence" in capsys.readouterr().err


def test_every_claim_is_measured():
    assert [each.NAME for each in STUDIES] == IDS


@pytest.mark.parametrize("kind", STUDIES, ids=lambda kind: kind.NAME)
def test_every_study_says_what_the_report_shows_and_has_10_seeds_or_more(kind):
    for text in (kind.CLAIM, kind.QUESTION, kind.SOURCE, kind.PROTOCOL, kind.WOULD_CHANGE):
        assert text.strip() == text != ""
    assert kind.QUESTION.endswith("?")
    assert kind.PROTOCOL.endswith(".")
    assert kind.WOULD_CHANGE.endswith(".")
    assert len({part.name for part in kind.PARTS}) == len(kind.PARTS) >= 1
    for part in kind.PARTS:
        assert part.effect
        assert part.source
        assert part.kind == "difference" or part.threshold > 0
    (headed,) = (part for part in kind.PARTS if part.name == kind.HEADLINE.part)
    headline.check(kind.HEADLINE, headed)
    assert kind.CHANGES
    for change in kind.CHANGES:
        datetime.date.fromisoformat(change.date)
    first = kind.of("default").first_seed
    assert kind.CHANGES[-1].seeds == f"{first} to {first + 9}"  # fresh after the last change
    assert kind.of("default").seeds >= 10
    assert kind.of("full").seeds >= 20
    assert kind.of("smoke").seeds == 2
    assert kind.of("full").first_seed == first >= study.FIRST_SEED


def run_all_in_smoke(folder):
    """As users have it: with JAX's own promotion of dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert main(["all", "--preset", "smoke", "--out", str(folder)]) == 0
    return report.read(folder / "verdicts.json")


def recorded(folder, name):
    """All runs of a claim, whatever their order in the file."""
    return runs.Record(folder / name / "digits" / "metrics.jsonl").runs


@pytest.mark.slow
def test_all_in_smoke_write_report_and_verdicts_and_go_on_where_they_were_stopped(tmp_path, monkeypatch):
    claims = run_all_in_smoke(tmp_path)
    assert [claim.id for claim in claims] == IDS
    assert {result.seeds for claim in claims for result in claim.results} == {2}
    assert_report_has(tmp_path, claims)
    before = {name: recorded(tmp_path, name) for name in IDS}
    # As if killed: one claim has begun, and the line of a run was cut; another has not begun; and there is no report.
    begun = tmp_path / "convergence" / "digits"
    config = json.loads((begun / "config.json").read_text())
    (begun / "config.json").write_text(json.dumps(config | {"complete": False}))
    lines = (begun / "metrics.jsonl").read_text().splitlines(keepends=True)
    last = json.loads(lines[-1])["network"]
    kept = [line for line in lines if json.loads(line)["network"] != last]
    (begun / "metrics.jsonl").write_text("".join(kept) + lines[-1][:-20])
    shutil.rmtree(tmp_path / "devices")
    for name in ("report.html", "verdicts.json"):
        (tmp_path / name).unlink()
    trained, add = set(), runs.Record.add
    monkeypatch.setattr(runs.Record, "add", lambda *args: trained.add((args[0].path.parts[-3], args[1])) or add(*args))
    again = run_all_in_smoke(tmp_path)
    assert {name for name, _ in trained} == {"convergence", "devices"}
    assert ("convergence", last) in trained
    assert len(trained) <= 3 + 2  # the three of devices; of convergence, those in one program with the lost one
    assert {name: recorded(tmp_path, name) for name in IDS} == before
    assert again == claims


@pytest.mark.results
def test_committed_verdicts_follow_from_the_committed_metrics(tmp_path, monkeypatch):
    assert len([*RESULTS.rglob("verdicts.json")]) == 1
    claims = report.read(RESULTS / "verdicts.json")
    assert [claim.id for claim in claims] == IDS
    for claim, kind in zip(claims, STUDIES, strict=True):
        for path in (RESULTS / kind.NAME).glob("*/*.json*"):
            folder = tmp_path / kind.NAME / path.parent.name
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder)
        monkeypatch.setattr(kind, "draw", lambda *args: None)
        section = study.conclude(kind, tmp_path)
        assert section.claim._replace(results=()) == claim._replace(results=())
        for found, committed in zip(section.claim.results, claim.results, strict=True):
            assert found._replace(parts=()) == committed._replace(parts=())
            assert [part.verdict for part in found.parts] == [part.verdict for part in committed.parts]
            for mine, theirs in zip(found.parts, committed.parts, strict=True):
                numbers = [[np.nan if x is None else x for x in part[3:9]] for part in (mine, theirs)]
                np.testing.assert_allclose(*numbers, rtol=1e-9)
        assert claim.results[0].dataset == "digits"
        for shown in section.shown:
            first, number = (shown.configuration[name] for name in ("first_seed", "seeds"))
            assert number >= 10
            assert number in protocol.LOOKS
            assert f"{first} to {first + 9}" in {change.seeds for change in claim.changes}
        assert section.shown[0].configuration["first_seed"] == kind().first_seed
    assert_report_has(RESULTS, claims)


def assert_report_has(folder, claims):
    """Every claim with its verdicts, and every figure as it lies beside."""
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    for claim, text in zip(claims, page.text["section"], strict=False):
        for shown in (claim.id, claim.claim, claim.question, claim.source, claim.protocol, claim.would_change):
            assert shown in text
        for result in claim.results:
            assert result.measured in text
            assert result.verdict in text
            for part in result.parts:
                assert part.effect in text
                assert part.verdict in text
    figures = {base64.b64decode(each["src"].removeprefix("data:image/png;base64,")) for each in page.pictures}
    assert figures == {path.read_bytes() for claim in claims for path in figures_of(folder, claim.id)}


def figures_of(folder, name):
    return [
        path.parent / f"{name}.png"
        for path in (folder / name).glob("*/config.json")
        if records.read_config(path.parent)["complete"]
    ]


@pytest.mark.results
@pytest.mark.slow
def test_the_committed_report_is_shown_whole_at_the_width_of_a_desk_and_of_a_phone():
    found, messages, missing = report_page.look(RESULTS / "report.html", (1280, 390))
    assert (messages, missing) == ([], [])
    for width in ("1280", "390"):
        shown = found[width]
        assert (shown["beyond"], shown["beyondOpen"], shown["cut"], shown["scrolling"]) == (0, 0, [], [])
        assert all(seen and opened == [name] for name, seen, opened in shown["opened"])


@pytest.mark.results
@pytest.mark.slow
def test_the_committed_report_is_drawn_without_a_message():
    messages, drawn = open_in_browser(RESULTS / "report.html")
    assert not messages
    assert drawn == [True] * sum(len(claim.results) for claim in report.read(RESULTS / "verdicts.json"))
