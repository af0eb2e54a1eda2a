"""What an assessment looks like: its plot, and its page."""

import json
import re
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from tests.core.assessing import Page, assessment
from tokenexit import TokenExitError
from tokenexit.assessment import Measured, page, plot
from tokenexit.schedule import Schedule

pytest.importorskip("matplotlib")

HOSTILE = "<script>alert(1)</script> & \"quotes\" 'too' </title> $title ${x} ünï ∑"


def written(found, folder, **options):
    page.write(found, folder / "page.html", **options)
    return (folder / "page.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def figure():
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(2, 1))
    drawn.subplots().set_title("image")
    return drawn


@pytest.mark.parametrize(
    ("options", "panels"),
    [
        ({}, ["times as fast as dense", "multiply-adds saved, % of dense"]),
        ({"timed": False}, ["multiply-adds saved, % of dense"]),
        ({"labels": True}, ["times as fast as dense", "multiply-adds saved, % of dense", "times as fast as dense"]),
        ({"timed": False, "labels": True}, ["multiply-adds saved, % of dense"]),
    ],
)
def test_a_plot_has_a_panel_for_what_was_measured(options, panels):
    drawn = plot.draw(assessment(**options))
    assert [axes.get_xlabel() for axes in drawn.axes] == panels
    texts = [text.get_text() for text in drawn.legends[0].get_texts()]
    ringed = ["chosen"] if options.get("timed", True) else []
    kinds = [kind for kind in plot.KINDS if kind != "compiled dense" or options.get("timed", True)]  # it has no cost
    assert texts == [*kinds, "at most 1 %", *ringed]
    sizes = {text.get_size() for text in [*drawn.legends[0].get_texts(), *drawn.axes[0].get_yticklabels()]}
    assert min(sizes) >= 9


def test_a_plot_shows_the_numbers():
    found = assessment(labels=True)
    times, saved, quality = plot.draw(found).axes
    for axes, x, y in (
        (times, [1.5, 1.9], [0.8, 3.0]),
        (saved, [40, 60], [0.8, 3.0]),
        (quality, [1.5, 1.9], [72.6, 71]),
    ):
        (container,) = [one for one in axes.containers if one.get_label() == "merging"]
        assert container[0].get_xdata() == pytest.approx(x)
        assert container[0].get_ydata() == pytest.approx(y)
        (ring,) = [line for line in axes.lines if line.get_label() == "chosen"]
        assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (pytest.approx(x[0]), pytest.approx(y[0]))
    (bars,) = next(one for one in times.containers if one.get_label() == "merging")[2]
    assert [segment[:, 0].tolist() for segment in bars.get_segments()] == [
        pytest.approx([1.48, 1.53]),
        pytest.approx([1.8, 2.0]),
    ]
    (dashed,) = [line for line in times.lines if line.get_label() == "at most 1 %"]
    assert set(dashed.get_ydata()) == {1.0}
    assert quality.get_ylim()[0] > 60  # truncation runs out of it, or the rest would be flat
    assert times.get_ylim()[1] > 13


def test_losses_far_apart_are_all_inside():
    for loss in (0.0, 1e-5, 1.0):
        found = assessment()
        found = replace(found, rows=(*found.rows, Measured("far", "exits", loss, 0.9, speedup=(1.0, 1.0, 1.0))))
        low, high = plot.draw(found).axes[0].get_ylim()
        assert low < 0 <= 100 * loss < high


def test_a_plot_of_the_dense_network_alone():
    found = replace(assessment(), rows=assessment().rows[:1])
    assert len(plot.draw(found).axes) == 2


@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_a_plot_is_written(ending, tmp_path):
    plot.draw(assessment(loss="$x_0$ <of> it, "), tmp_path / "new" / f"plot{ending}")
    assert [one.name for one in (tmp_path / "new").iterdir()] == [f"plot{ending}"]
    assert (tmp_path / "new" / f"plot{ending}").stat().st_size > 1000


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("assessment", lambda found, folder: plot.draw(found.rows)),
        ("file", lambda found, folder: plot.draw(found, 3)),
        ("file", lambda found, folder: plot.draw(found, folder / "plot.html")),
        ("file", lambda found, folder: plot.draw(found, folder)),
        ("assessment", lambda found, folder: plot.draw(assessment(timed=False, rows=(Measured("a", "dense", 0.0),)))),
        ("assessment", lambda found, folder: page.write(found.to_dict(), folder / "page.html")),
        ("file", lambda found, folder: page.write(found, None)),
        ("file", lambda found, folder: page.write(found, folder)),
        ("figures", lambda found, folder: page.write(found, folder / "page.html", figures=3)),
        ("figures", lambda found, folder: page.write(found, folder / "page.html", figures=["a", "b"])),
        ("figures", lambda found, folder: page.write(found, folder / "page.html", figures=[("a", "figure")])),
    ],
)
def test_what_is_no_argument_is_refused_and_nothing_is_written(argument, call, tmp_path):
    with pytest.raises(TokenExitError, match=f"`{argument}` must"):
        call(assessment(), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "call"), [("plot", plot.draw), ("page", lambda found: page.write(found, "page.html"))]
)
def test_without_matplotlib_it_is_said_what_to_install(name, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(TokenExitError, match=rf"`{name}` must have matplotlib, `pip install tokenexit\[viz\]`"):
        call(assessment())


@pytest.mark.parametrize("labels", [False, True])
def test_a_page_says_what_was_found(labels, tmp_path, figure):
    found = assessment(labels=labels)
    root = Page(written(found, tmp_path, figures=[("Image 1", figure)])).root
    (html,) = root.all("html")
    assert html.attributes["lang"] == "en"
    assert any(one.attributes.get("name") == "viewport" for one in root.all("meta"))
    (body,) = root.all("body")
    assert [one.text for one in body.all("h1")] == ["Worth it"]
    said = found.verdict().removeprefix("Worth it: ")
    assert all(sentence in body.text for sentence in said.split(". "))
    assert all(words in body.text for words in (found.conditions, *found.notes, "1.50 \u00d7", "0.8 %", "40 %"))
    (table,) = body.all("table")
    (head,) = table.all("thead")
    assert {one.attributes.get("scope") for one in head.all("th")} == {"col"}
    assert ("mIoU, %" in head.text) == labels
    rows = table.all("tbody")[0].all("tr")
    names = [row.all("th")[0].text.removesuffix(" chosen") for row in rows]
    assert names == [row.name for row in found.ordered]
    assert {len(row.all("td")) + 1 for row in rows} == {len(head.all("th"))}
    (chosen,) = [row for row in rows if row.attributes.get("class") == "chosen"]
    assert chosen.text.startswith("merging 0.95 chosen0.80")
    assert "1.50 [1.48, 1.53]" in chosen.text
    assert body.text.count(" chosen0") == 1


def test_the_plot_is_a_part_of_the_page_and_has_words(tmp_path):
    text = written(assessment(), tmp_path)
    (svg,) = Page(text).root.all("svg")
    assert svg.attributes["role"] == "img"
    assert "merging 0.95, 1.50 times as fast as dense at 0.8 %" in svg.attributes["aria-label"]
    first = [one.tag for one in svg.everything[:2]]
    assert first == ["title", "desc"]
    assert all(svg.all(tag)[0].text for tag in first)
    inside = re.search("<svg.*</svg>", text, re.DOTALL)
    tree = ET.fromstring(inside[0])  # also by the stricter rules of SVG files
    names = [one.get("id") for one in tree.iter() if one.get("id")]
    assert len(set(names)) == len(names) > 10


def test_the_plan_of_a_page_is_the_one_that_was_chosen(tmp_path):
    found = assessment()
    root = Page(written(found, tmp_path)).root
    (details,) = root.all("details")
    (code,) = details.all("code")
    assert Schedule.from_dict(json.loads(code.text)) == found.plan
    (use,) = [one.text for one in root.all("pre") if "Schedule.from_dict" in one.text]
    assert "model.retune(plan)" in use
    none = Page(written(assessment(timed=False), tmp_path)).root
    assert (none.all("details"), none.all("dl")) == ([], [])
    assert [one.text for one in none.all("thead")[0].all("th")] == [
        "contender",
        "pixels that get another class, %",
        "multiply-adds, dense = 1",
        "kind",
    ]
    assert "saves more" in none.all("figcaption")[0].text
    assert none.all("h1")[0].text == "Nothing was timed"
    assert not [row for row in none.all("tr") if row.attributes.get("class") == "chosen"]


def test_the_lines_of_python_on_the_page_run(tmp_path, monkeypatch):
    found, given = assessment(), []
    root = Page(written(found, tmp_path)).root
    (details,) = root.all("details")
    (tmp_path / "plan.json").write_text(details.all("code")[0].text)
    monkeypatch.chdir(tmp_path)
    code = "".join(next(one for one in root.all("code") if "import json" in one.text).inside)
    exec(code, {"model": type("Model", (), {"retune": lambda _, plan: given.append(plan)})()})
    assert given == [found.plan]


def test_figures_have_captions_and_words(tmp_path, figure):
    root = Page(written(assessment(), tmp_path, figures=[("Image 1", figure), (HOSTILE, figure)])).root
    shown = [one for one in root.all("figure") if one.all("img")]
    assert [one.all("figcaption")[0].text for one in shown] == ["Image 1", HOSTILE]
    images = [one.all("img")[0].attributes for one in shown]
    assert [one["alt"] for one in images] == ["Image 1: image", f"{HOSTILE}: image"]
    assert all(one["src"].startswith("data:image/png;base64,iVBOR") for one in images)


def test_names_are_never_read_as_html(tmp_path, figure):
    found = assessment(name=HOSTILE, loss=HOSTILE, machine=HOSTILE, notes=(HOSTILE,), labels=True)
    text = written(found, tmp_path, figures=[(HOSTILE, figure)])
    root = Page(text).root
    assert root.all("script") == []
    assert "<script" not in text
    (row,) = [one for one in root.all("tr") if one.attributes.get("class") == "chosen"]
    assert row.all("th")[0].text == f"{HOSTILE} chosen"
    plain = Page(written(assessment(labels=True), tmp_path, figures=[("plain", figure)])).root
    outside = [[one.tag for one in tree.everything if one.tag not in ("tspan", "text", "g")] for tree in (root, plain)]
    assert outside[0] == outside[1]
    handlers = [name for one in root.everything for name in one.attributes if name.startswith("on")]
    assert handlers == []


def test_names_that_are_no_unicode_or_in_no_font_are_written_all_the_same(tmp_path):
    assert "名前" in written(assessment(name="\ud800 名前", loss="画素"), tmp_path)


def test_a_page_asks_for_nothing_else(tmp_path, figure):
    text = written(assessment(labels=True), tmp_path, figures=[("Image 1", figure)])
    for one in Page(text).root.everything:
        for name in ("href", "src", "xlink:href", "srcset", "data", "action", "rdf:resource"):
            assert (one.attributes.get(name) or "data:").startswith(("data:", "#")), (one.tag, name)
    addresses = set(re.findall(r"https?://[^\"'<> ]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"url\(([^)]*)\)", text)) <= set(re.findall(r"url\((#[^)]*)\)", text))
    assert "@import" not in text


def test_the_same_assessment_gives_the_same_bytes(tmp_path, figure):
    import matplotlib as mpl

    first = written(assessment(labels=True), tmp_path, figures=[("Image 1", figure)])
    with mpl.rc_context({"axes.facecolor": "red", "font.size": 30, "svg.hashsalt": "another"}):
        before = dict(mpl.rcParams)
        again = written(assessment(labels=True), tmp_path, figures=[("Image 1", figure)])
        assert dict(mpl.rcParams) == before
    assert again == first
    assert [one.name for one in tmp_path.iterdir()] == ["page.html"]


def test_a_page_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    before = written(assessment(), tmp_path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(TokenExitError, match="`file` must .* disk full"):
        page.write(assessment(labels=True), tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == before
    assert [one.name for one in tmp_path.iterdir()] == ["page.html"]
