"""The page of an assessment in a real browser: on a wide screen and on a phone, light and dark."""

import pytest

from tests.core.assessing import assessment
from tokenexit.assessment import page

figures = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> " + "long" * 60


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    wide = figures.Figure(figsize=(17, 3))
    wide.subplots(1, 5)
    page.write(assessment(labels=True), folder / "labels.html", figures=[("Image 1", wide)])
    page.write(assessment(timed=False, notes=()), folder / "untimed.html")
    hostile = assessment(name=HOSTILE, loss=HOSTILE, machine=HOSTILE, notes=(HOSTILE,))
    page.write(hostile, folder / "hostile.html", figures=[(HOSTILE, wide)])
    return folder


@pytest.mark.parametrize("name", ["labels", "untimed", "hostile"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 420, 360])
def test_a_page_is_shown_whole(browser, pages, name, scheme, width):
    said, asked = [], []
    seen = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    for event in ("console", "pageerror", "dialog", "requestfailed"):
        seen.on(event, lambda one: said.append(one))  # Playwright marks what it is given
    seen.on("request", lambda request: asked.append(request.url))
    seen.goto((pages / f"{name}.html").as_uri())
    plot = seen.locator("figure.plot svg").bounding_box()
    assert plot["width"] > 0.8 * min(width, 528)
    assert plot["height"] > 250
    assert plot["x"] >= 0
    assert plot["x"] + plot["width"] <= width
    box, table = seen.locator(".box:has(table)").bounding_box(), seen.locator("table").bounding_box()
    assert seen.locator("tbody tr").count() == len(assessment().rows)
    assert box["width"] <= width
    assert table["height"] > 200
    if width < 500:
        assert table["width"] > box["width"]  # scrolls by itself
    sides = seen.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth]")
    assert max(sides[:2]) <= sides[2] == width
    answer = seen.locator("h1").bounding_box()
    assert answer["y"] < 200
    least = "Math.min(...[...document.querySelectorAll('svg text')].map(one => one.getBoundingClientRect().height))"
    assert seen.evaluate(least) > 7
    paper, ink = (seen.evaluate(f"getComputedStyle(document.body).{one}") for one in ("backgroundColor", "color"))
    assert (brightness(paper) > brightness(ink)) == (scheme == "light")
    assert [one for one in asked if not one.startswith(("file:", "data:"))] == []
    assert len([one for one in asked if one.startswith("file:")]) == 1
    assert [getattr(one, "text", one) for one in said] == []
    seen.close()


def brightness(colour):
    """Of rgb(1, 2, 3)."""
    return sum(int(one) for one in colour.removeprefix("rgb(").removesuffix(")").split(","))


def test_the_plan_unfolds(browser, pages):
    seen = browser.new_page(viewport={"width": 420, "height": 900})
    seen.goto((pages / "labels.html").as_uri())
    plan = seen.locator("details pre")
    assert not plan.is_visible()
    seen.locator("summary").click()
    assert plan.is_visible()
    assert seen.evaluate("document.documentElement.scrollWidth") == 420
    seen.close()
