"""The documentation's site, built strictly, and every page of it as a browser shows it, on a desktop and on a phone."""

import pytest

pytest.importorskip("mkdocs", reason="the documentation is built by the extra `docs`")

from docs.tools import signatures
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
def test_every_page_is_shown_whole(folder, width):
    names = pages(folder)
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
        assert seen["heading"], name
        assert seen["text"] > 200, name
        # On a desktop the navigation stands beside the page, on a phone behind a button.
        assert seen["links"] > 20 if width == 1280 else seen["menu"], name


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
