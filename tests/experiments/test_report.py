"""The report of the experiments: what it says, that it is one file, and that a browser shows it."""

import base64
import json
from pathlib import Path

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.harness import forest, headline, marks, protocol, readme, report
from tests.support import report_page
from tests.support.browser import open_in_browser
from tests.support.page import Page

FACTS = {"preset": "quick", "devices": "1 ± 0 & <none> else"}
STEPS = protocol.Part("steps <same>", "steps of 'a' / b & c", 2.0, "Ioffe & Szegedy, figure <3>", paper="2.3 & more")
ACCURACY = protocol.Part("accuracy", "with - without", 0.0, "any difference", "difference")
TIME = protocol.Part("time", "time with / without", 1.05, "noticed from there", side="below")
FEWER = headline.Headline("steps <same>", "{} <steps> & more with b", "b & c")


def result(dataset, *effects, **remarks):
    """The parts with effects of that mean, or of nan in one seed."""
    spread = np.linspace(-0.1, 0.1, 10)
    values = {part.name: np.asarray(mean * np.exp(spread) if mean > 0 else mean + spread) for part, mean in effects}
    parts = tuple(protocol.decide([part for part, _ in effects], values, remarks))
    return report.Result(dataset, 10, protocol.verdict(parts), parts, f"0.7 ± 0.1 & 'more' on {dataset}")


@pytest.fixture
def sections(tmp_path):
    """One with two data sets, figures, a table and text that HTML would take for its own, and one as bare as can be."""
    figures = [tmp_path / "one.png", tmp_path / "two.png"]
    for width, path in enumerate(figures, 1):
        plt.imsave(path, np.full((350, 700 * width, 3), 0.5))
    hostile = report.Claim(
        id="depth",
        claim='Deeper is <b> & "x" better',
        headline=FEWER,
        question="Is <i> deeper & better?",
        source="Ioffe & Szegedy, 2015, </section>",
        protocol="<script>alert(1)</script> at {{ 3 }} depths",
        would_change="Ratios < 2 & > 1",
        changes=(report.Change("2026-02-28", "the threshold was 3 & is <2>", "100 to 109"),),
        results=(
            result(
                "digits", (STEPS, 3.0), (ACCURACY, -1.0), (TIME, 1.1), remarks={"time": "at the <edge> of its grid"}
            ),
            result("fashion & more", (STEPS, 2.0), (ACCURACY, np.nan)),
        ),
    )
    bare = report.Claim("bare", "Nothing", FEWER, "", "", "", "", (), (result("digits", (STEPS, 3.0)),))
    table = [["network", "steps <to> best"], ["plain & simple", "25 ± 7"], ["<i>", "never"]]
    configuration = {"hidden": [16, 8], "data_dir": None, "runtime": {"devices": 2}}
    first = report.Shown(figures, 'What "it" shows', table, 83.4, configuration, "run 'a' > b && c")
    second = report.Shown([], "", [], np.nan, {"other": 1}, "run on others")
    return [
        report.Section(hostile, (first, second)),
        report.Section(bare, (report.Shown([], "", [], 0.25, {}, "run bare"),)),
    ]


@pytest.fixture
def page(tmp_path, sections):
    report.write(tmp_path / "out", sections, FACTS)
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert not page.open
    return page


def test_verdicts_json_is_what_was_given(tmp_path, sections, page):
    path = tmp_path / "out" / "verdicts.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["protocol"] == {"error": protocol.ERROR, "statement": report.statement()}
    assert report.read(path) == [section.claim for section in sections]
    claim = content["claims"][0]
    assert [*claim] == [*report.Claim._fields]
    assert [*claim["results"][0]["parts"][0]] == [*protocol.Decided._fields]
    assert claim["results"][1]["parts"][1]["value"] is None
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "verdicts.json"]


def test_the_tally_counts_claims_on_each_data_set(sections, page):
    counts = (
        "Of 2 claims on digits, 1 holds and 1 holds in part; 3 of 4 parts are decided. "
        "Of 1 claim on fashion & more, 1 is undecided; 0 of 2 parts are decided."
    )
    assert report.tally([section.claim for section in sections]) == counts
    assert counts in page.text["header"][0]


def test_a_data_set_is_the_same_at_any_size_of_its_images(sections):
    claim, bare = (section.claim for section in sections)
    small, large = (claim.results[1]._replace(dataset=f"fashion & more ({side} x {side})") for side in (7, 14))
    claims = [claim._replace(results=(claim.results[0], small)), bare._replace(results=(*bare.results, large))]
    assert report.datasets(claims) == ["digits", "fashion & more"]
    assert report.tallies(claims)[1] == "Of 2 claims on fashion & more, 2 are undecided; 0 of 4 parts are decided."


def test_parts_with_opposite_verdicts_are_counted_and_named(sections):
    """Whichever data set contradicts the other; undecided parts and those without effect contradict nothing."""
    claim, bare = (section.claim for section in sections)
    one, two = claim.results
    turns = [("holds", "refuted"), ("refuted", "holds"), ("holds", "undecided"), ("no effect", "refuted")]
    for verdicts in turns:
        turned = [
            result._replace(parts=(result.parts[0]._replace(verdict=verdict), *result.parts[1:]))
            for result, verdict in zip((one, two), verdicts, strict=True)
        ]
        claims = [claim._replace(results=(*turned,)), bare]
        contrary = verdicts in turns[:2]
        expected = [report.Opposite(claim.id, two.dataset, *(each.parts[0] for each in turned))] if contrary else []
        assert report.opposites(claims) == expected
        first, second = report.tallies(claims)
        assert "against" not in first
        assert second.endswith("decided, 1 of them against the verdict on digits.") == contrary
        elsewhere = [each._replace(dataset=f"{side} (8 x 8)") for side, each in zip("ab", turned, strict=True)]
        assert report.opposites([bare, claim._replace(results=(*elsewhere,))]) == []  # bare has the first data set


def test_the_forest_has_a_line_for_each_part_on_each_data_set(sections, page):
    nav = page.text["details"][0]
    assert "Forest plot: the effects of all 4 parts" in nav
    assert nav.count("claimed") == 3 + 1  # the threshold of each part, once
    results = [found for section in sections for found in section.claim.results]
    labels = [
        f"{part.verdict}: {forest.numbers(part)}, {forest.limit(part)}" for found in results for part in found.parts
    ]
    assert sorted(page.labels) == sorted(labels)
    for found in results:
        for part in found.parts:
            assert part.name in nav
            assert forest.numbers(part) in nav
    ends = [reference for reference in page.references if reference.startswith("#")]
    judged = "#how-claims-are-judged"
    assert ends == [judged, "#depth", "#bare", *["#depth"] * 3, "#bare", "#depth"]


def test_report_says_all_that_was_given_as_it_was_given(sections, page):
    for name, value in FACTS.items():
        assert page.text["dd"][page.text["dt"].index(name)] == value
    for section, text in zip(sections, page.text["section"], strict=False):
        claim = section.claim
        said = [claim.id, claim.claim, claim.question, claim.source, claim.protocol, claim.would_change]
        for change in claim.changes:
            said += change
        for found in claim.results:
            said += [found.dataset, found.verdict, found.measured, f"({found.seeds} seeds)"]
            for part in found.parts:
                said += [part.name, part.effect, part.source, part.paper, part.verdict, part.remark]
                said += [forest.numbers(part), forest.limit(part)]
        for value in said:
            assert value in text
        assert all(shown.command in page.text["pre"] for shown in section.shown)
    cells = [cell.replace("\N{NO-BREAK SPACE}", " ") for cell in page.text["th"] + page.text["td"]]
    assert all(cell in cells for row in sections[0].shown[0].table for cell in row)
    times = [words for words in page.text["p"] if words.startswith("To repeat it")]
    assert times == [f"To repeat it ({time}):" for time in ("1 min 23 s", "time unknown", "0.2 s")]
    configuration = dict(zip(page.text["dt"], page.text["dd"], strict=True))
    assert [configuration[name] for name in ("hidden", "data_dir", "runtime.devices")] == ["16, 8", "None", "2"]
    assert len(page.text["script"]) == 1
    assert "alert" not in page.text["script"][0]


def test_the_report_lists_changes_and_states_the_protocol(sections, page):
    *_, judged = page.text["section"]
    (change,) = sections[0].claim.changes
    assert all(words in judged for words in (*change, "depth"))
    statement = report.statement()
    assert len(statement) == 12
    for name, text in statement.items():
        assert page.text["dd"][page.text["dt"].index(name)] == text
    assert f"at most {protocol.ERROR:.0%}" in statement["Intervals"]
    assert report.STATEMENT.read_text(encoding="utf-8").count("\n* ") == len(statement)


def test_data_sets_are_side_by_side_unless_their_thresholds_differ(sections):
    (steps, _, time), (also, *_) = (each.parts for each in sections[0].claim.results)
    rows = report.rows(sections[0].claim)
    assert [[*row.on] for row in rows] == [["digits", "fashion & more"]] * 2 + [["digits"]]
    assert rows[0].on == {"digits": steps, "fashion & more": also}
    assert rows[2].part == time
    results = [each._replace(dataset=f"{i}") for i, each in enumerate(sections[1].claim.results * 2)]
    results[1] = results[1]._replace(parts=(results[1].parts[0]._replace(threshold=1.5),))
    assert len(report.rows(sections[1].claim._replace(results=tuple(results)))) == 2


def test_report_is_one_file(sections, page):
    kind = "data:image/png;base64,"
    assert [picture["src"].startswith(kind) for picture in page.pictures] == [True, True]
    contents = [base64.b64decode(picture["src"].removeprefix(kind), validate=True) for picture in page.pictures]
    assert contents == [path.read_bytes() for path in sections[0].shown[0].figures]
    assert [picture["alt"] for picture in page.pictures] == [f'What "it" shows ({i} of 2)' for i in (1, 2)]
    assert [(picture["width"], picture["height"]) for picture in page.pictures] == [("500", "250"), ("1000", "250")]
    local = {f"#{section.claim.id}" for section in sections} | {"#how-claims-are-judged"}
    assert {reference for reference in page.references if not reference.startswith(kind)} == {"data:,", *local}
    assert len({*page.ids}) == len(page.ids)
    assert {reference[1:] for reference in local} <= {*page.ids}
    assert "url(" not in page.text["style"][0]
    assert "@import" not in page.text["style"][0]


def with_claim(section, **changes):
    return section._replace(claim=section.claim._replace(**changes))


def with_result(section, **changes):
    return with_claim(section, results=(section.claim.results[0]._replace(**changes),))


def with_shown(section, **changes):
    return section._replace(shown=(section.shown[0]._replace(**changes),))


def with_part(section, **changes):
    part = section.claim.results[0].parts[0]._replace(**changes)
    return with_result(section, parts=(part,), verdict=protocol.verdict([part]))


@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        (lambda a, b: [a, with_result(b, verdict="true")], ValueError, r"bare has 1 parts on digits and .* 'true'"),
        (lambda a, b: [a, with_result(b, verdict=protocol.REFUTED)], ValueError, r"that follows from them, 'holds'"),
        (lambda a, b: [a, with_result(b, parts=())], ValueError, r"bare has 0 parts .*\. Pass one part or more"),
        (lambda a, b: [a, with_claim(b, results=())], ValueError, r"bare has results on \[\] and 1 of Shown"),
        (lambda a, b: [a, b._replace(shown=())], ValueError, r"bare has results on \['digits'\] and 0 of Shown"),
        (lambda a, b: [a, with_claim(b, results=b.claim.results * 2)._replace(shown=b.shown * 2)], ValueError, "own"),
        (lambda a, b: [a, with_claim(b, id="depth")], ValueError, r"2 have the id 'depth'. Give each an id"),
        (lambda a, b: [a, with_claim(b, headline=FEWER._replace(part="x"))], ValueError, r"bare has no part 'x'"),
        (lambda a, b: [a, with_claim(b, headline=FEWER._replace(subject="d"))], ValueError, r"has 'd' on no side"),
        (lambda a, b: [a, with_part(b, high=np.inf)], ValueError, r"bare has \[.*inf.*\] in part 'steps <same>'"),
        (lambda a, b: [a, with_claim(b, changes=(report.Change("May", "", ""),))], ValueError, "'May'. Pass an ISO"),
        (
            lambda a, b: [a, with_shown(b, table=[["a", "b"], ["1"]])],
            ValueError,
            r"bare has table rows of 1 to 2 cells",
        ),
        (lambda a, b: [a, with_shown(b, figures=[Path("none.png")])], OSError, "none"),
        (lambda a, b: [a, with_shown(b, figures=[Path(__file__)])], ValueError, r"test_report\.py is not a PNG file"),
    ],
)
def test_write_rejects_and_leaves_what_was_there(tmp_path, sections, page, broken, error, message):
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(error, match=message):
        report.write(tmp_path / "out", broken(*sections), {})
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_the_list_has_verdicts_and_one_number_in_words_for_each_claim(sections, page):
    claims = [section.claim for section in sections]
    first, second = page.text["li"][:2]
    assert " ".join(first.split()) == (
        'Deeper is <b> & "x" better 3.0 times fewer <steps> & more with b steps <same> '
        "holds in part on digits undecided on fashion & more"
    )
    assert " ".join(second.split()) == "Nothing 3.0 times fewer <steps> & more with b steps <same> holds on digits"
    (one,) = claims[1].results
    twice = claims[1]._replace(results=(one, one._replace(dataset="others")))
    listed = Page(str(report.listed([twice], "there.html", measured=True)))
    assert listed.references == ["there.html#bare"]
    assert "holds on digits and others" in " ".join(listed.text["li"][0].split())
    assert "On others: 0.7 ± 0.1 & 'more' on digits" in listed.text["li"][0]
    assert "\n\n" not in report.listed(claims)  # Markdown would end the list there
    assert str(report.listed(claims)) in (page_source := page.source)
    assert report.style() in page_source


def test_a_number_names_the_verdict_on_its_part_unless_that_on_the_claim_says_it(sections):
    claim = sections[0].claim
    assert (claim.results[0].verdict, report.said(claim).verdict) == (protocol.IN_PART, "")
    refuted = claim._replace(headline=headline.Headline("accuracy", "{} points with", "with", "height"))
    assert report.said(refuted).verdict == protocol.REFUTED
    assert report.said(refuted).words == "1.0 lower points with"
    unmeasured = refuted._replace(results=(claim.results[1],))
    assert report.said(unmeasured)[:1] + report.said(unmeasured)[2:] == ("not measured", "fashion & more", "")


def test_every_verdict_has_a_mark_of_its_own():
    assert [*marks.VERDICTS] == [*protocol.VERDICTS]
    looks = [(mark.shape, mark.filling) for mark in marks.VERDICTS.values()]
    assert len({*looks}) == len(looks)
    css = report.style()
    for verdict, mark in marks.VERDICTS.items():
        assert mark.shape in marks.SHAPES
        assert f".{marks.classes(verdict).split()[0]} {{" in css
        assert all(colour in css for colour in mark.colours)


def test_the_readme_has_a_line_for_each_data_set_and_two_numbers(tmp_path, sections, page):
    lines = readme.lines(tmp_path / "out" / "verdicts.json").splitlines()
    assert lines[:2] == [f"* {line}" for line in report.tallies([section.claim for section in sections])]
    said = "3.0 times fewer <steps> & more with b"
    assert lines[2:] == [f"* Holds: Nothing ({said}). [All claims](docs/claims.md)."]
    claim = sections[1].claim
    result = claim.results[0]._replace(verdict=protocol.REFUTED_IN_PART)
    doubtful = sections[0].claim._replace(id="doubtful", results=(result,))
    section = sections[1]._replace(claim=doubtful)
    path = tmp_path / "verdicts.json"
    content = json.loads((tmp_path / "out" / "verdicts.json").read_text(encoding="utf-8"))
    content["claims"].append(report._plain(section.claim))
    path.write_text(json.dumps(content), encoding="utf-8")
    last = readme.lines(path).splitlines()[-1]
    assert f'Refuted in part: Deeper is <b> & "x" better ({said} (holds)).' in last.replace("; holds", " (holds)")


def test_update_replaces_the_lines_between_the_marks(tmp_path, page):
    path, verdicts = tmp_path / "README.md", tmp_path / "out" / "verdicts.json"
    path.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    for _ in range(2):
        readme.update(path, verdicts)
        assert path.read_text() == f"before\n{readme.BEGIN}\n{readme.lines(verdicts)}\n{readme.END}\nafter\n"
    for text in (f"{readme.END} {readme.BEGIN}", readme.BEGIN, "", f"{readme.BEGIN}{readme.END}{readme.END}"):
        path.write_text(text)
        with pytest.raises(ValueError, match="<!-- claims: begin -->"):
            readme.update(path, verdicts)
        assert path.read_text() == text


def test_a_browser_shows_the_report_without_a_complaint(tmp_path, page):
    assert open_in_browser(tmp_path / "out" / "report.html") == ([], [True, True])


def test_in_a_browser_each_line_opens_its_claim_at_the_width_of_a_desk_and_of_a_phone(tmp_path, page):
    found, messages, missing = report_page.look(tmp_path / "out" / "report.html", (1280, 390))
    assert (messages, missing) == ([], [])
    for width in (1280, 390):
        shown = found[str(width)]
        assert shown["inner"] == width
        assert (shown["beyond"], shown["beyondOpen"], shown["cut"], shown["asked"]) == (0, 0, [], [])
        assert shown["scrolling"] == []
        assert shown["open"] == 0
        assert shown["opened"] == [[id, True, [id]] for id in ["depth", "bare", *["depth"] * 3, "bare"]]
        assert shown["folded"] == {"fold": [False, False], "group": [width == 1280] * 2}
    assert found["unscripted"] == [True] * (2 + 2 + 2)


def test_look_notices_a_wide_page_and_a_dead_link(tmp_path):
    """Else the test above would say nothing."""
    path = tmp_path / "report.html"
    path.write_text(
        '<!DOCTYPE html><body><div class="forest"><a href="#one"><span>a</span></a></div><section id="one">'
        '<details class="whole">b</details></section><div style="width: 900px">c</div><img src="none.png">'
        '<script>console.error("on purpose")</script></body>'
    )
    found, messages, missing = report_page.look(path, (390,))
    assert any("on purpose" in message for message in messages)
    assert "/none.png" in missing
    assert found["390"]["beyond"] > 500
    assert found["390"]["asked"][0].endswith("/none.png")
    assert found["390"]["opened"] == [["one", True, []]]


def test_open_in_browser_notices_a_broken_picture_and_an_error(tmp_path):
    """Else the tests above would say nothing."""
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
