"""The figures of the site: the committed files are what the code draws, and those that pages show exist."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest

from examples import figures
from examples.figures import charts
from examples.figures.sheet import THEMES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
IMAGES = DOCS / "images"
_SHOWN = re.compile(r"images/(?P<name>[\w-]+)\.(?P<theme>light|dark)\.svg#only-(?P<only>light|dark)\)")


def pinned(package: str) -> str:
    """Version of a package in constraints.txt."""
    found = re.search(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found
    return found[1]


@pytest.mark.parametrize("name", [name for name, entry in figures.FIGURES.items() if not entry.needs_model])
def test_the_committed_figure_is_what_is_drawn(name: str, tmp_path: Path) -> None:
    for package in ("matplotlib", "numpy"):
        if version(package) != pinned(package):
            pytest.skip(
                f"drawn by {package} {pinned(package)}, this is {version(package)}: run `make figures` with that"
            )
    for theme in THEMES:
        drawn = figures.draw(name, theme, tmp_path)
        assert drawn.read_bytes() == (IMAGES / drawn.name).read_bytes(), f"run `make figures`: {drawn.name} is another"


def test_every_figure_is_there_in_both_schemes_and_small() -> None:
    wanted = {f"{name}.{theme.name}.svg" for name in figures.FIGURES for theme in THEMES}
    assert {file.name for file in IMAGES.glob("*.svg")} == wanted
    for name, entry in figures.FIGURES.items():
        sizes = [(IMAGES / f"{name}.{theme.name}.svg").stat().st_size for theme in THEMES]
        assert max(sizes) < (200_000 if entry.needs_model else 60_000), name


def test_figures_that_pages_show_exist_in_both_schemes() -> None:
    for page in sorted(DOCS.rglob("*.md")):
        shown = [one.groups() for one in _SHOWN.finditer(page.read_text(encoding="utf-8"))]
        every = re.findall(r"images/[\w.-]+\.svg", page.read_text(encoding="utf-8"))
        assert len(every) == len(shown), f"{page}: one is shown in another way"
        assert all(theme == only for _, theme, only in shown), page
        schemes = [sorted(name for name, theme, _ in shown if theme == scheme.name) for scheme in THEMES]
        assert schemes[0] == schemes[1], f"{page}: one scheme is missing"
        assert set(schemes[0]) <= set(figures.FIGURES), page


def test_the_frontier_has_the_numbers_of_the_run_with_nothing_else_running() -> None:
    found = list(charts.measured(charts.RESULTS.read_text(encoding="utf-8")))
    kinds = [kind for kind, _, _ in found]
    counts = {kind: kinds.count(kind) for kind in kinds}
    assert counts == {
        "truncated": 2, "exits": 2, "ToMe": 2, "smaller input": 1, "merging, then exits": 4, "merging": 1,
    }  # fmt: skip
    assert ("exits", 2.07, 0.0) in found
    assert ("merging, then exits", 2.57, -0.21) in found
    assert ("truncated", 1.9, -1.64) in found
