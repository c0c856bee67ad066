"""The documentation's site, built strictly, and every page of it as a browser shows it, on a desktop and on a phone."""

from types import SimpleNamespace

import pytest

pytest.importorskip("mkdocs", reason="the documentation is built by the extra `docs`")

from mkdocs.commands import build
from mkdocs.config import load_config

from docs.tools import hooks, signatures
from tests.support import constructors, site

pytestmark = [pytest.mark.slow, pytest.mark.results]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    site.build(folder)
    return folder


def pages(folder):
    """All pages but the report, which has a test of its own, and the one for what is not found."""
    names = (page.relative_to(folder).as_posix() for page in sorted(folder.rglob("*.html")))
    return [name for name in names if not name.startswith("results/") and name != "404.html"]


def test_the_site_has_the_pages_of_each_kind(folder):
    assert {"index.html", "quick-start.html", "tour.html", "reference/functions.html"} <= set(pages(folder))
    assert (folder / "results" / "report.html").is_file()
    text = (folder / "reference" / "functions.html").read_text(encoding="utf-8")
    assert 'id="bnjax.bn_apply"' in text
    assert "running = momentum * running" in text


@pytest.mark.parametrize("width", [1280, 390])
def test_every_page_is_shown_whole_and_legible_in_both_color_schemes(folder, width):
    names = [*pages(folder), "results/report.html"]
    with site.served(folder) as (address, missing):
        found, messages = site.look(address, names, width)
    assert not messages
    assert not missing
    assert list(found) == names
    for name, seen in found.items():
        assert seen["inner"] == width, name
        assert seen["overflow"] <= 0, f"{name} is {seen['overflow']} px wider than a window of {width}"
        assert not seen["broken"], name
        assert not seen["external"], name
        assert not seen["cut"], f"{name}: tables that are cut off without a sign: {seen['cut']}"
        for scheme, colors in seen["schemes"].items():
            assert not colors["faint"], f"{name}: text of too little contrast in {scheme}: {colors['faint']}"
            assert not colors["bare"], f"{name}: figures without a light ground in {scheme}: {colors['bare']}"
        if name == "results/report.html":  # has tests of its own
            continue
        assert seen["heading"], name
        assert seen["text"] > 200, name
        # On a desktop the navigation stands beside the page, on a phone behind a button.
        assert seen["links"] > 20 if width == 1280 else seen["menu"], name


@pytest.mark.parametrize(("preferred", "scheme"), [("light", "default"), ("dark", "slate")])
def test_a_page_has_the_color_scheme_that_the_system_prefers(folder, preferred, scheme):
    with site.served(folder) as (address, _):
        found, _ = site.look(address, ["quick-start.html"], 390, preferred)
    assert found["quick-start.html"]["preferred"] == scheme


def test_links_and_anchors_lead_to_files_and_elements(folder):
    assert site.dead_links(folder) == []


@pytest.mark.parametrize("page", ["index.html", "guides/devices.html"])
def test_search_works_in_a_page_that_is_opened_from_the_folder(folder, page):
    found, messages = site.search(folder, page, "renormalization")
    assert not messages
    guide = (folder / "guides" / "variants.html").as_uri()
    assert any(link.startswith(guide) and link.endswith("#batch-renormalization") for link in found), found


def test_a_dead_link_or_anchor_is_seen(tmp_path):
    (tmp_path / "a.html").write_text('<p id="here"><a href="#here"></a><a href=b.html#there></a><img src="none.png">')
    (tmp_path / "b.html").write_text(
        "<a href='a.html#gone'></a><a href='https://example.org/none'></a><p id=there></p>"
    )
    assert sorted(site.dead_links(tmp_path)) == ["a.html: none.png", "b.html: a.html#gone"]


def test_the_pages_link_to_a_repository_and_ask_it_for_nothing(tmp_path):
    """In a project that has set its address; the theme would ask GitHub for the number of stars."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Page\n")
    config = SimpleNamespace(repo_url=None, repo_name=None, site_url=None)
    (tmp_path / "pyproject.toml").write_text(
        '[project]\n[project.urls]\nRepository = "https://github.com/a/b"\nDocumentation = "https://a.example/b"\n'
    )
    hooks.on_config(config, tmp_path / "pyproject.toml")
    assert vars(config) == {
        "repo_url": "https://github.com/a/b",
        "repo_name": "a/b",
        "site_url": "https://a.example/b/",
    }
    options = {"docs_dir": str(tmp_path / "docs"), "site_dir": str(tmp_path / "site"), "hooks": [], "plugins": []}
    with (site.ROOT / "mkdocs.yml").open("rb") as file:
        built = load_config(file, nav=[{"Home": "index.md"}], **options, **vars(config))
    build.build(built)
    page = (tmp_path / "site" / "index.html").read_text()
    assert page.count('<a href="https://github.com/a/b" title="Go to repository" class="md-source">') == 2
    assert 'data-md-component="source"' not in page
    assert '<link rel="canonical" href="https://a.example/b/index.html">' in page


def test_without_an_address_the_pages_have_no_link_to_a_repository(folder):
    if not hooks.addresses():
        assert "md-source" not in (folder / "index.html").read_text(encoding="utf-8")


def test_a_page_that_is_too_wide_or_lacks_a_picture_is_seen(tmp_path):
    body = '<div style="width: 500px">wide</div><img src="none.png"><script>console.error("a message")</script>'
    (tmp_path / "page.html").write_text(f"<!DOCTYPE html><body>{body}", encoding="utf-8")
    with site.served(tmp_path) as (address, missing):
        found, messages = site.look(address, ["page.html"], 390)
    seen = found["page.html"]
    assert seen["overflow"] > 100
    assert seen["broken"] == [f"{address}/none.png"]
    assert missing == ["/none.png"]
    assert any("a message" in message for message in messages)


def test_a_table_that_is_cut_off_and_text_that_is_faint_are_seen(tmp_path):
    wide = '<table><tr><td style="min-width: 900px">NAME</td></tr></table>'
    sign = "background: linear-gradient(red, blue) local"
    body = f"""<article><p style="color: #888; background: #777">faint</p><p>plain</p>
        <div style="overflow: hidden">{wide.replace("NAME", "hidden")}</div>
        <div style="overflow: auto">{wide.replace("NAME", "without a sign")}</div>
        <div style="overflow: auto; {sign}">{wide.replace("NAME", "signed")}</div>
        <table><tr><td>narrow</td></tr></table>
        <style>[data-md-color-scheme=slate] .dark {{ background: #222 }}</style>
        <div class="dark"><img src="dark.svg"></div></article>"""
    (tmp_path / "dark.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')
    (tmp_path / "page.html").write_text(f"<!DOCTYPE html><body>{body}", encoding="utf-8")
    with site.served(tmp_path) as (address, _):
        found, _ = site.look(address, ["page.html"], 390)
    assert found["page.html"]["cut"] == ["TABLE hidden", "TABLE without a sign"]
    assert found["page.html"]["schemes"]["slate"] == {"faint": ["P faint"], "bare": [f"{address}/dark.svg"]}


def test_the_reference_shows_the_constructors_of_the_live_classes(folder):
    shown = constructors.shown(folder)
    assert set(shown) == set(signatures.classes().values())
    for cls, path in signatures.classes().items():
        if path in signatures.RESULTS:
            assert not shown[path], path
            continue
        found, expected = constructors.parsed(shown[path]), constructors.live(cls)
        assert found.keys() == expected.keys(), path
        for name, (keyword, default) in found.items():
            assert keyword == expected[name][0], f"{path}({name})"
            assert constructors.same(default, expected[name][1]), f"{path}({name}={default!r})"
    assert {"ghost_size", "axis_name", "dtype", "rngs"} <= constructors.parsed(shown["bnjax.nnx.GhostBatchNorm"]).keys()
    assert constructors.parsed(shown["bnjax.linen.GhostBatchNorm"])["momentum"] == (False, 0.99)
