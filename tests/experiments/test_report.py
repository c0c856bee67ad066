"""The report of the experiments: what it says, that it is one file, and that a browser shows it."""

import base64
import json
from pathlib import Path

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.harness import report
from tests.support.browser import open_in_browser
from tests.support.page import Page

FACTS = {"preset": "quick", "devices": "1 ± 0 & <none> else"}


@pytest.fixture
def sections(tmp_path):
    """One with figures, a table and text that HTML would take for its own, and one as bare as can be."""
    figures = [tmp_path / "one.png", tmp_path / "two.png"]
    for width, path in enumerate(figures, 1):
        plt.imsave(path, np.full((350, 700 * width, 3), 0.5))
    hostile = report.Verdict(
        id="depth",
        claim='Deeper is <b> & "x" better',
        source="Ioffe & Szegedy, 2015, </section>",
        measured="0.7 ± 0.1 & 'more'",
        threshold="<script>alert(1)</script> at least {{ 3 }}",
        verdict=report.IN_PART,
        seeds=3,
    )
    bare = report.Verdict("bare", "Nothing", "", "nothing", "none", report.HOLDS, 1)
    table = [["network", "steps <to> best"], ["plain & simple", "25 ± 7"], ["<i>", "never"]]
    configuration = {"hidden": [16, 8], "data_dir": None, "runtime": {"devices": 2}}
    return [
        report.Section(hostile, figures, 'What "it" shows', table, 83.4, configuration, "run 'a' > b && c"),
        report.Section(bare, [], "", [], 0.25, {}, "run bare"),
    ]


@pytest.fixture
def page(tmp_path, sections):
    report.write(tmp_path / "out", sections, FACTS)
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert not page.open
    return page


def test_verdicts_json_is_what_was_given(tmp_path, sections, page):
    verdicts = json.loads((tmp_path / "out" / "verdicts.json").read_text(encoding="utf-8"))
    assert verdicts == [section.verdict._asdict() for section in sections]
    assert [*verdicts[0]] == ["id", "claim", "source", "measured", "threshold", "verdict", "seeds"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "verdicts.json"]


def test_report_says_all_that_was_given_as_it_was_given(sections, page):
    assert "Of 2 claims, 1 holds, 1 holds in part and 0 do not hold here." in page.text["header"][0]
    for name, value in FACTS.items():
        assert page.text["dd"][page.text["dt"].index(name)] == value
    summary, *rest = page.text["table"]
    assert len(rest) == 1
    for section, text in zip(sections, page.text["section"], strict=True):
        verdict = section.verdict
        for name in ("id", "claim", "measured", "verdict"):
            assert getattr(verdict, name) in summary
        for value in (verdict.id, verdict.claim, verdict.source, verdict.measured, verdict.threshold, verdict.verdict):
            assert value in text
        assert section.command in page.text["pre"]
    cells = page.text["th"] + page.text["td"]
    assert all(cell in cells for row in sections[0].table for cell in row)
    assert "3 seeds, 1 min 23 s" in page.text["section"][0]
    assert "1 seed, 0.2 s" in page.text["section"][1]
    configuration = dict(zip(page.text["dt"], page.text["dd"], strict=True))
    assert [configuration[name] for name in ("hidden", "data_dir", "runtime.devices")] == ["16, 8", "None", "2"]
    assert "script" not in page.text


def test_report_is_one_file(sections, page):
    kind = "data:image/png;base64,"
    assert [picture["src"].startswith(kind) for picture in page.pictures] == [True, True]
    contents = [base64.b64decode(picture["src"].removeprefix(kind), validate=True) for picture in page.pictures]
    assert contents == [path.read_bytes() for path in sections[0].figures]
    assert [picture["alt"] for picture in page.pictures] == [f'What "it" shows ({i} of 2)' for i in (1, 2)]
    assert [(picture["width"], picture["height"]) for picture in page.pictures] == [("500", "250"), ("1000", "250")]
    assert {reference for reference in page.references if not reference.startswith(kind)} == {
        "data:,",
        *(f"#{section.verdict.id}" for section in sections),
    }
    assert page.ids == [section.verdict.id for section in sections]
    assert "url(" not in page.text["style"][0]
    assert "@import" not in page.text["style"][0]


def with_verdict(section, **changes):
    return section._replace(verdict=section.verdict._replace(**changes))


@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        (lambda a, b: [a, with_verdict(b, verdict="true")], ValueError, r"bare has the verdict 'true'. Pass one of"),
        (lambda a, b: [a, with_verdict(b, id="depth")], ValueError, r"2 have the id 'depth'. Give each an id"),
        (lambda a, b: [a, b._replace(table=[["a", "b"], ["1"]])], ValueError, r"bare has table rows of 1 to 2 cells"),
        (lambda a, b: [a, b._replace(figures=[a.figures[0] / "none"])], OSError, "none"),
        (lambda a, b: [a, b._replace(figures=[Path(__file__)])], ValueError, r"test_report\.py is not a PNG file"),
    ],
)
def test_write_rejects_and_leaves_what_was_there(tmp_path, sections, page, broken, error, message):
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(error, match=message):
        report.write(tmp_path / "out", broken(*sections), {})
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_browser_shows_the_report_without_a_complaint(tmp_path, page):
    assert open_in_browser(tmp_path / "out" / "report.html") == ([], [True, True])


def test_open_in_browser_notices_a_broken_picture_and_an_error(tmp_path):
    """Else the test above would say nothing."""
    path = tmp_path / "page.html"
    broken = base64.b64encode(b"\x89PNG\r\n\x1a\n and no more").decode()
    plt.imsave(tmp_path / "beside.png", [[[0.0, 0.5, 1.0]]])
    path.write_text(
        f'<!DOCTYPE html><body><img src="data:image/png;base64,{broken}"><img src="beside.png">'
        '<script>nothing.at.all()</script><script>console.error("on purpose")</script></body>'
    )
    messages, drawn = open_in_browser(path)
    assert drawn == [False, False]
    assert any("nothing is not defined" in message for message in messages)
    assert any("on purpose" in message for message in messages)
