"""The documentation: every public name is in the API reference, and the reference shows what the docstrings say."""

import html
import json
import re
from xml.etree import ElementTree

import pytest

pytest.importorskip("griffe", reason="the documentation is built by the extra `docs`")

import bnjax.diagnosis
import bnjax.linen
from docs.tools import docstrings, drawings, public, signatures, tables
from experiments.harness import protocol, readme, report
from tests.support.markdown import PAGES, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_public_name_has_a_docstring_and_an_entry_in_the_reference():
    assert public.problems() == []


def test_a_public_name_that_the_reference_lacks_is_a_problem(monkeypatch):
    monkeypatch.setattr(public, "documented", lambda: sorted(public.names() - {"bnjax.bn_apply"}))
    assert public.problems() == ["bnjax.bn_apply is public, but no page of docs/reference has it."]


def objects(kind):
    """The public functions or classes by name, with their docstring and their source."""
    for name in sorted(public.names()):
        found = public.package()[name.partition(".")[2]]
        found = found.final_target if found.is_alias else found
        if found.kind.value == kind:
            yield name, found.docstring.value, found.source


def test_functions_and_classes_that_take_arguments_have_an_example():
    classes = [(name, text, source) for name, text, source in objects("class") if "Args:" in text]
    assert [name for name, text, _ in (*objects("function"), *classes) if "Example:" not in text] == []
    assert {"bnjax.linen.BNLSTMCell", "bnjax.nnx.GhostBatchNorm"} <= {name for name, _, _ in classes}


def test_functions_name_the_errors_that_they_raise():
    missing = {}
    for name, text, source in objects("function"):
        named = text.partition("Raises:")[2]
        errors = set(re.findall(r"\braise (\w+)\(", source))
        if re.search(r"\b(checks\.\w+|checked)\(", source):
            errors.add("Error")  # of one kind or another
        missing[name] = {error for error in errors if error not in named}
    assert {name: errors for name, errors in missing.items() if errors} == {}


def test_diagnose_is_in_its_package_too():
    assert bnjax.diagnosis.diagnose is bnjax.diagnose


def test_every_parameter_of_a_class_is_explained():
    """`Model` is made by the steps of training, and `RESULTS` have no constructor of their own."""
    missing = {}
    for cls, path in signatures.classes().items():
        if path not in signatures.RESULTS and path != "bnjax.training.Model":
            explained = signatures.explanations(cls)
            missing[path] = [p.name for p in signatures.constructor(cls) if not explained.get(p.name)]
    assert {path: names for path, names in missing.items() if names} == {}
    assert "bnjax.nnx.GhostBatchNorm" in missing


def test_an_explanation_is_the_one_of_the_class_that_has_the_parameter():
    found = signatures.explanations(bnjax.linen.GhostBatchNorm)
    assert found["ghost_size"] == "number of examples in a group, > 0."
    assert found["epsilon"] == "a small float added to variance to avoid dividing by zero."  # Flax's words
    assert found["use_fast_variance"].startswith("has no effect")  # ours, where Flax's do not hold
    shown = docstrings.arguments(bnjax.linen.GhostBatchNorm)
    assert '\n??? note "As in `bnjax.linen.BatchNorm`"\n' in shown
    assert "    - `epsilon`: a small float" in shown


def test_sections_of_a_docstring_become_lists():
    text = """One line.

        y = x

Args:
  params, state: of the layer,
    as in `bnjax.bn_apply`.
  *args: others.

Returns:
  y: of x's shape.

Raises:
  ValueError: for nothing.

Example:
  >>> 1 + 1
  2
"""
    assert docstrings.markdown(text).split("\n\n")[2:] == [
        "**Arguments**",
        "- `params`, `state`: of the layer,\n    as in [`bnjax.bn_apply`][bnjax.bn_apply].\n- `*args`: others.",
        "**Returns**",
        "- `y`: of x's shape.",
        "**Raises**",
        "- `ValueError`: for nothing.",
        "**Example**",
        "```pycon\n>>> 1 + 1\n2\n```",
        "",
    ]


def test_names_link_to_the_reference_outside_of_blocks():
    text = "`bnjax.fold(params)` and `bnjax.nothing`\n\n```python\n`bnjax.fold`\n```\n\n# `bnjax.fold`"
    linked = "[`bnjax.fold(params)`][bnjax.fold] and `bnjax.nothing`"
    assert docstrings.linked(text) == text.replace("`bnjax.fold(params)` and `bnjax.nothing`", linked)


def test_names_link_to_the_reference_in_folds_and_tabs_but_not_in_their_code():
    lines = ['??? note "fold"', "    NAME", "    - NAME", "        NAME", "    NAME", "x", "    NAME"]
    text = "\n\n".join(lines).replace("NAME", "`bnjax.fold`")
    assert [line.strip() for line in docstrings.linked(text).split("\n")[2::2]] == [
        "[`bnjax.fold`][bnjax.fold]",
        "- [`bnjax.fold`][bnjax.fold]",
        "`bnjax.fold`",
        "[`bnjax.fold`][bnjax.fold]",
        "x",
        "`bnjax.fold`",
    ]


def test_readme_has_at_most_90_lines_and_an_example_by_line_15():
    lines = README.splitlines()
    assert len(lines) <= 90
    assert any("bn_apply(" in line for line in lines[:15])


@pytest.mark.results
def test_readme_has_the_committed_numbers():
    assert tables.comparison() in README


@pytest.mark.results
def test_the_committed_verdicts_are_on_the_page_of_claims():
    shown = tables.verdicts()
    claims = tables.claims()
    assert len(claims) == 13
    for claim in claims:
        (row,) = [item for item in shown.split("<li>") if f'href="results/report.html#{claim.id}"' in item]
        assert html.escape(claim.claim, quote=False) in html.unescape(row)
        assert report.said(claim).words in html.unescape(row)
        for result in claim.results:
            assert f">{result.verdict}</span>" in row
            assert result.dataset in row
    assert str(report.listed(claims)).replace('href="#', 'href="results/report.html#') in shown
    assert str(report.listed(claims)) in (tables.RESULTS / "report.html").read_text(encoding="utf-8")
    (cost,) = (claim for claim in claims if claim.id == "cost")
    assert cost.results[0].measured in tables.verdicts(["cost"])


@pytest.mark.results
def test_the_page_of_claims_names_what_the_second_data_set_contradicts_or_lacks(monkeypatch):
    verdicts = json.loads((tables.RESULTS / "verdicts.json").read_text(encoding="utf-8"))["claims"]
    shown = tables.second_data_set()
    named = set()
    for claim in verdicts:
        first, *others = claim["results"]
        assert (f"`{claim['id']}`" in shown.partition("Not measured on it: ")[2].partition(".")[0]) == (not others)
        for here, there in zip(first["parts"], others[0]["parts"] if others else (), strict=bool(others)):
            assert here["name"] == there["name"]
            if sorted((here["verdict"], there["verdict"])) == ["holds", "refuted"]:
                named.add(f"{here['name']} (`{claim['id']}`:")
    assert all(each in shown for each in named)
    assert ("No part that holds on one of the two is refuted on the other." in shown) == (not named)
    (claim,) = (each for each in tables.claims() if each.id == "convergence")
    first, second = claim.results
    turned = second._replace(parts=(first.parts[0]._replace(verdict="refuted"), *second.parts[1:]))
    assert first.parts[0].verdict == "holds"
    monkeypatch.setattr(tables, "claims", lambda: [claim._replace(results=(first, turned))])
    assert f"are refuted on the other: {first.parts[0].name} (`convergence`" in tables.second_data_set()
    assert tables.second_data_set().startswith("All 1 claims were measured on mnist8000")


@pytest.mark.results
def test_the_readme_has_the_lines_on_the_committed_verdicts():
    """`python -m experiments report --out experiments/results --readme README.md` writes it."""
    lines = readme.lines(tables.RESULTS / "verdicts.json")
    assert readme.replaced(README, lines) == README


@pytest.mark.results
def test_every_table_is_on_a_page_and_can_be_made():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = re.findall(r"^ *<!-- table: (\S+) -->$", text, re.MULTILINE)
    assert set(named) == set(tables.TABLES)
    for make in tables.TABLES.values():
        assert make().count("\n") != 1


@pytest.mark.results
def test_the_drawings_are_those_that_the_code_draws_and_are_on_pages():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    for name, drawn in drawings.drawings().items():
        assert (drawings.IMAGES / name).read_text(encoding="utf-8") == drawn, "run `python -m docs.tools.drawings`"
        assert ElementTree.fromstring(drawn).find("{http://www.w3.org/2000/svg}title") is not None
        assert re.search(rf"!\[[^\]]+\]\(\S*images/{name}\)", text), f"{name} is on no page, or has no description"


@pytest.mark.results
def test_the_flow_chart_says_of_each_branch_what_was_measured():
    assert {*drawings.WORDS} == {protocol.HOLDS, protocol.REFUTED, protocol.NO_EFFECT, protocol.UNDECIDED}
    found = {branch.use + " " + branch.what[0]: drawings.measured(branch) for branch in drawings.BRANCHES}
    assert found["BatchNorm synchronized"] == found["BNLSTM statistics of"] == ["measured: helps"]
    assert found["ConditionalBatchNorm scale and bias"] == ["not measured here"]
    for branch in drawings.BRANCHES:
        assert hasattr(bnjax.linen, branch.use)
        row = next(line for line in tables.which_variant().splitlines() if " ".join(branch.question) in line)
        assert "; ".join(drawings.measured(branch)) in row


@pytest.mark.results
def test_the_guides_have_the_numbers_of_the_committed_verdicts():
    """Those that are written into sentences by hand."""
    on = {claim.id: claim.results for claim in tables.claims()}
    digits, other = ({part.name: part.value for part in result.parts} for result in on["batch-size"])
    remedies = ("remedy, renormalized", "remedy, group normalization")
    more, fewer = ([round(100 * abs(found[name] - 1)) for name in remedies] for found in (digits, other))
    assert min(digits[name] for name in remedies) > 1 > max(other[name] for name in remedies)
    recipes = " ".join((ROOT / "docs" / "guides" / "recipes.md").read_text(encoding="utf-8").split())
    assert f"made {more[0]}% more errors than renormalization and {more[1]}% more than group normalization" in recipes
    assert f"where it made {fewer[0]}% and {fewer[1]}% fewer." in recipes
    variants = (ROOT / "docs" / "guides" / "variants.md").read_text(encoding="utf-8")
    lstm, normalized = zip(
        *(
            re.search(r"test accuracy ([\d.]+) ± [\d.]+ and ([\d.]+)", each.measured).groups()
            for each in on["recurrent"]
        ),
        strict=True,
    )
    for words, one, two in zip(
        ("higher than an LSTM's on digits", "lower on `mnist8000`"), normalized, lstm, strict=True
    ):
        assert f"{words} ({float(one):.3f} and {float(two):.3f})" in variants


@pytest.mark.results
def test_the_flow_chart_names_the_data_sets_if_they_disagree(tmp_path, monkeypatch):
    branch = next(each for each in drawings.BRANCHES if each.evidence == ("batch-size", "remedy, renormalized"))
    results = [
        {"dataset": dataset, "parts": [{"name": "another", "verdict": "holds"}, {"name": branch.evidence[1], **found}]}
        for dataset, found in (("digits", {"verdict": "holds"}), ("mnist8000 (14 x 14)", {"verdict": "refuted"}))
    ]
    verdicts = tmp_path / "verdicts.json"
    monkeypatch.setattr(drawings, "VERDICTS", verdicts)
    verdicts.write_text(json.dumps({"claims": [{"id": "batch-size", "results": results}]}), encoding="utf-8")
    assert drawings.measured(branch) == ["digits: helps", "mnist8000: does not help"]
    verdicts.write_text(json.dumps({"claims": [{"id": "batch-size", "results": results[1:]}]}), encoding="utf-8")
    assert drawings.measured(branch) == ["measured: does not help"]


@pytest.mark.slow
def test_the_pictures_of_the_guide_show_what_it_says(flax_promotion):
    from docs.tools import pictures

    problems = {name: {f.problem for f in diagnosis.findings} for name, diagnosis in pictures.diagnoses().items()}
    assert problems == {
        "healthy": set(),
        "shifted": {"variance differs", "mean shifted"},
        "feature": {"variance differs"},
        "lagging": {"initial values", "variance differs"},
        "dead": {"dead features"},
    }


@pytest.mark.results
def test_links_of_readme_and_contributing_lead_to_files():
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#]+)", text):
            assert link.startswith("https://") or (ROOT / link).is_file(), f"{name}: {link}"
