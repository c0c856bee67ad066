"""More seeds for undecided parts: which runs get them, how they are judged, and how the measurement goes on."""

import json
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest

import experiments.__main__ as commands
from experiments.harness import data, files, headline, lab, protocol, report, runs, seeds, study
from experiments.harness.protocol import HOLDS, LOOKS, UNDECIDED

CLEAR, SMALL, NONE, EDGE = "clear", "small", "none", "at the edge"


@dataclass(frozen=True)
class Tossing(study.Study):
    """A claim with a clear effect, a small one, none, and one whose rate is at an edge, measured at once."""

    NAME = "tossing"
    CLAIM = "coins fall"
    QUESTION = "Do they?"
    SOURCE = "nobody"
    HEADLINE = headline.Headline(CLEAR, "{} of the coins")
    PROTOCOL = "They are thrown."
    WOULD_CHANGE = "Nothing."
    PARTS = tuple(protocol.Part(name, name, 0.0, "more", "difference") for name in (CLEAR, SMALL, NONE, EDGE))
    SMOKE = {"seeds": 2}
    FULL = {"seeds": 20}

    small: float = 0.8
    """the small effect, in standard deviations"""

    def measure(self, lab: lab.Lab) -> None:
        for arm, mean in ((CLEAR, 9.0), (SMALL, self.small), (NONE, 0.0), (EDGE, 9.0)):
            for seed in lab.record.missing([arm], lab.seeds):
                if not lab.may_go_on():
                    raise lab_module.TimeIsUpError
                value = mean + np.random.default_rng([seed, len(arm), 7]).normal()
                lab.record.add(arm, seed, [0], {"value": value})

    def judge(self, metrics):
        effects = {part.name: metrics[part.name]["value"] for part in self.PARTS}
        return study.Finding(effects, "", "", [["coins"]], {EDGE: "at the edge"})

    def draw(self, path, metrics, title):
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(8) + bytes([0, 0, 1, 0, 0, 0, 1, 0]))


@dataclass(frozen=True)
class Resting(Tossing):
    """The same claim with nothing that more seeds can decide."""

    NAME = "resting"
    PARTS = tuple(protocol.Part(name, name, 0.0, "more", "difference") for name in (CLEAR, EDGE))


lab_module = lab  # `lab` is the argument's name in `measure`
KINDS = (Tossing, Resting)


@pytest.fixture
def out(tmp_path):
    """A folder with both claims at ten seeds, of which the small effect and none are open in one."""
    study.run_all([kind(out=tmp_path) for kind in KINDS], KINDS)
    return tmp_path


def results(out):
    return {claim.id: claim.results[0] for claim in report.read(out / "verdicts.json")}


def decisions(out, name="tossing"):
    return {part.name: (part.verdict, part.n) for part in results(out)[name].parts}


def config(out, name="tossing"):
    return json.loads((out / name / "digits" / "config.json").read_text())


@pytest.fixture
def added(monkeypatch):
    """The runs that are measured from now on."""
    added, add = [], runs.Record.add
    monkeypatch.setattr(runs.Record, "add", lambda *args: added.append(args[1:3]) or add(*args))
    return added


def test_open_parts_get_seeds_look_by_look_and_decided_ones_stay(out, added, capsys):
    before = results(out)
    assert decisions(out) == {CLEAR: (HOLDS, 10), SMALL: (UNDECIDED, 10), NONE: (UNDECIDED, 10), EDGE: (UNDECIDED, 10)}
    seeds.more(seeds.More(out=out), KINDS)
    assert results(out)["resting"] == before["resting"]
    after = results(out)["tossing"]
    assert after.parts[0] == before["tossing"].parts[0]
    assert decisions(out) == {CLEAR: (HOLDS, 10), SMALL: (HOLDS, 20), NONE: (UNDECIDED, 40), EDGE: (UNDECIDED, 40)}
    assert after.seeds == 40
    by_arm = [(arm, seed) for seed_of in (range(2010, 2020), range(2020, 2030), range(2030, 2040))
              for arm in (CLEAR, SMALL, NONE, EDGE) for seed in seed_of]  # fmt: skip
    assert added == by_arm
    assert "No part is open" not in capsys.readouterr().out
    seeds.more(seeds.More(out=out), KINDS)  # 40 seeds are the last look
    assert added == by_arm
    assert "No part is open" in capsys.readouterr().out


def test_a_dry_run_says_what_it_would_measure_and_changes_nothing(out, added, capsys):
    path = out / "tossing" / "digits" / "config.json"
    path.write_text(json.dumps(config(out) | {"seconds": 120.0}))
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    capsys.readouterr()
    seeds.more(seeds.More(out=out, dry_run=True), KINDS)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    assert added == []
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["tossing,", "digits", "10", "20", "120", "360", "small;", "none"]
    assert lines[2] == ["all", "120", "360", "2", "parts"]
    assert len(lines) == 3  # nothing about the claim without open parts


def test_the_cost_of_seeds_leaves_out_the_choice_of_rates(out):
    path = out / "tossing" / "digits" / "metrics.jsonl"
    tuning = '{"network":"tuning","seed":900,"steps":[0],"value":1.0}\n'
    path.write_text(path.read_text() + tuning * 1 + tuning.replace("900", "901") * 1)
    (out / "tossing" / "digits" / "config.json").write_text(json.dumps(config(out) | {"seconds": 210.0}))
    (run,) = seeds.found(seeds.More(out=out), KINDS)
    assert (run.next_seconds, run.all_seconds) == (pytest.approx(200), pytest.approx(600))


def stops_after(monkeypatch, trainings):
    """The time is up after so many questions for it."""
    clock = iter([0.0] * (1 + trainings))
    monkeypatch.setattr(seeds, "time", SimpleNamespace(monotonic=lambda: next(clock, 1e9)))


def test_where_the_time_was_up_the_same_command_goes_on(out, tmp_path, monkeypatch, added, capsys):
    ten = results(out)
    stops_after(monkeypatch, 17)
    seeds.more(seeds.More(out=out), KINDS)
    assert len(added) == 17
    assert results(out) == ten  # the report is on the complete look
    assert (config(out)["complete"], config(out)["config"]["seeds"]) == (True, 10)
    said = capsys.readouterr().out
    assert "The time was up. The same command resumes with:" in said
    assert said.rstrip().splitlines()[-2].startswith("tossing, digits  10     20 ")
    stops_after(monkeypatch, 30)  # 23 of them for the rest of the look, and then 7
    seeds.more(seeds.More(out=out), KINDS)
    assert len(added) == 17 + 30
    assert decisions(out)[SMALL] == (HOLDS, 20)
    assert config(out)["config"]["seeds"] == 20
    monkeypatch.undo()
    seeds.more(seeds.More(out=out), KINDS)
    whole = tmp_path / "whole"
    study.run_all([Tossing(out=whole, seeds=40), Resting(out=whole)], KINDS)
    assert results(out) == results(whole)
    assert (
        runs.Record(out / "tossing/digits/metrics.jsonl").runs
        == runs.Record(whole / "tossing/digits/metrics.jsonl").runs
    )


def test_a_killed_look_leaves_the_look_before_it_complete(out, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    seconds = config(out)["seconds"]
    monkeypatch.setattr(runs.Record, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        seeds.more(seeds.More(out=out), KINDS)
    found = config(out)
    assert (found["complete"], found["config"]["seeds"]) == (True, 10)
    assert found["seconds"] >= seconds


def test_seeds_of_a_complete_measurement_are_never_left_out(out, added):
    seeds.more(seeds.More(out=out), KINDS)
    found, number = results(out), len(added)
    study.run_all([kind(out=out) for kind in KINDS], KINDS)  # as `make claims`, with ten seeds
    assert results(out) == found
    assert len(added) == number


def test_seeds_between_looks_are_judged_at_the_look_before(out):
    ten = results(out)["tossing"]
    study.run_all([Tossing(out=out, seeds=19)], KINDS)
    assert results(out)["tossing"].parts == ten.parts
    (run,) = seeds.found(seeds.More(out=out), KINDS)
    assert (run.study.seeds, run.look) == (19, 20)


def test_runs_are_chosen_by_claim_data_set_and_stream(out):
    def names(**changes):
        return [run.name for run in seeds.found(seeds.More(out=out, **changes), KINDS)]

    study.run_all([Tossing(out=out, stream=True)], KINDS)
    assert names() == ["tossing, digits", "tossing, digits, moving"]
    assert names(stream=True) == ["tossing, digits, moving"]
    assert names(claims=("resting",)) == []
    assert len(names(claims=("tossing",), dataset="digits")) == 2
    for changes in {"dataset": "mnist"}, {"data_dir": out}:
        with pytest.raises(data.InputError, match="no complete run"):
            names(**changes)


@pytest.fixture
def digits(tmp_path):
    """A folder of IDX files."""
    rng, folder = np.random.default_rng(0), tmp_path / "files" / "eights"
    folder.mkdir(parents=True)
    for name, number in zip(files.IDX_FILES, (40, 40, 20, 20), strict=True):
        shape = (number, 8, 8) if "images" in name else (number,)
        values = rng.integers(0, 256, shape) if "images" in name else np.arange(number) % 10
        header = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
        (folder / name).write_bytes(header + values.astype(np.uint8).tobytes())
    return folder


def test_a_data_set_in_files_may_lie_elsewhere_and_is_named_if_it_is_not_there(tmp_path, digits, added, capsys):
    out = tmp_path / "out"
    study.run_all([Tossing(out=out, data_dir=digits), Tossing(out=out)], KINDS)
    moved = tmp_path / "elsewhere" / "eights"
    moved.parent.mkdir()
    digits.rename(moved)
    del added[:]
    seeds.more(seeds.More(out=out, claims=("tossing",)), KINDS)
    assert f"not measured: tossing, eights: {digits}: no such folder" in capsys.readouterr().out
    assert {seed for _, seed in added} == {*range(2010, 2040)}  # those of scikit-learn's digits
    seeds.more(seeds.More(out=out, data_dir=moved), KINDS)
    found = json.loads((out / "tossing" / "eights" / "config.json").read_text())
    assert (found["config"]["seeds"], found["config"]["data_dir"]) == (40, str(digits))
    labels = moved / files.IDX_FILES[1]
    study.run_all([Tossing(out=tmp_path / "again", data_dir=moved)], KINDS)
    labels.write_bytes(labels.read_bytes()[:-1] + b"\7")
    with pytest.raises(data.InputError, match="dataset_sha256"):
        seeds.more(seeds.More(out=tmp_path / "again"), KINDS)


def test_a_laboratory_without_time_begins_no_training(tmp_path):
    laboratory = lab.Lab(None, runs.Record(tmp_path / "metrics.jsonl"), [0], may_go_on=lambda: False)  # type: ignore
    with pytest.raises(lab.TimeIsUpError):
        laboratory.fit(["arm"], None, settings=[{}])  # type: ignore
    laboratory.record.add("arm", 0, [0], {})
    laboratory.fit(["arm"], None, settings=[{}])  # type: ignore  # nothing is missing


def test_the_command_has_its_flags(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(seeds, "more", lambda config, kinds: asked.append((config, kinds)))
    assert commands.main(["more", "--claims", "cost", "noise", "--minutes", "5", "--dry-run", "--out", "there"]) == 0
    ((given, kinds),) = asked
    assert kinds == commands.STUDIES
    assert (given.claims, given.minutes, given.dry_run, str(given.out)) == (("cost", "noise"), 5.0, True, "there")
    assert replace(given, claims=(), minutes=110.0, dry_run=False, out=seeds.More().out) == seeds.More()
    assert commands.main(["more", "--claims", "coffee"]) == 2
    assert "claims=coffee: expected some of convergence" in capsys.readouterr().err


def test_no_run_has_more_seeds_than_the_last_look():
    assert protocol.next_look(LOOKS[-1]) is None


def test_a_folder_that_was_moved_gets_its_seeds_where_it_is(out, added, capsys):
    moved = out.rename(out.parent / "moved")
    seeds.more(seeds.More(out=moved), KINDS)
    assert config(moved)["config"]["seeds"] == 40
    assert not out.exists()


def test_a_folder_without_a_run_that_is_asked_for_is_an_error(out, tmp_path):
    for config in seeds.More(out=tmp_path / "nowhere"), seeds.More(out=out, stream=True):
        with pytest.raises(data.InputError, match=r"no complete run there .* python -m experiments all --out"):
            seeds.more(config, KINDS)
    with pytest.raises(data.InputError, match=r"no complete run is there.* python -m experiments all --out"):
        study.write_report(tmp_path / "nowhere", KINDS)
