"""The documentation: every public name has its place, every page is in the navigation, and the code runs."""

import ast
import functools
import importlib
import inspect
import pkgutil
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

import tokenexit
import tokenexit_cli
import tokenexit_jax
import tokenexit_torch
from tests.timm_import import import_timm
from tests.website import pages

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
_BLOCK = re.compile(r"^::: (?P<name>\S+)\n(?P<options>(?:[ ]{4}.*\n|\n(?=[ ]{4}))*)", re.MULTILINE)
_FENCE = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def modules() -> Iterator[ModuleType]:
    """Every public module of the library: those of the core, and the rooms of the adapters.

    What is inside of a room is public where the room offers it; networks that ship with the library are rooms themselves.
    """
    for package in (tokenexit, tokenexit_torch, tokenexit_jax, tokenexit_cli):
        yield package
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            room, _, name = info.name.rpartition(".")
            of_room = room not in (package.__name__, "tokenexit.guarantees", f"{package.__name__}.models")
            if not of_room and not name.startswith("_"):
                yield importlib.import_module(info.name)


def home(module: ModuleType, name: str) -> str:
    """One name for one object, by however many modules it is offered."""
    value = getattr(module, name)
    if inspect.ismodule(value):
        return value.__name__
    if inspect.isclass(value) or inspect.isfunction(value):
        return f"{value.__module__}.{value.__qualname__}"
    return f"{module.__name__}.{name}"


def resolved(dotted: str) -> str | None:
    """The `home` of what a page names; None if there is no such thing."""
    path, _, name = dotted.rpartition(".")
    try:
        return home(importlib.import_module(path), name)
    except (ImportError, AttributeError, ValueError):
        return None


def documented(text: str) -> list[str]:
    """Dotted names in the blocks of a page, those in members lists included."""
    names = []
    for block in _BLOCK.finditer(text):
        options = yaml.safe_load(block["options"]) or {}
        members = options.get("options", {}).get("members") or []
        names += [block["name"], *(f"{block['name']}.{member}" for member in members)]
    return names


def complaints(text: str) -> list[str]:
    """What is wrong with the API pages, taken together."""
    found = {name: resolved(name) for name in documented(text)}
    places = Counter(found[name] for name in documented(text))
    public = {home(module, name) for module in modules() for name in module.__all__}
    return [
        *(f"{name} does not exist" for name, target in found.items() if target is None),
        *(f"{name} has no place" for name in sorted(public - places.keys())),
        *(f"{name} has {count} places" for name, count in places.items() if name is not None and count > 1),
        *(f"{name} is not public" for name in sorted(filter(None, places.keys() - public))),
    ]


def api_pages() -> str:
    return "\n".join((DOCS / page).read_text() for page in PAGES if page.startswith("api/"))


def test_every_public_name_has_exactly_one_place() -> None:
    assert complaints(api_pages()) == []


@pytest.mark.parametrize(("old", "new", "complaint"), [
    ("        - margin\n", "", "tokenexit.scores.margin has no place"),
    ("        - margin\n", "        - margni\n", "tokenexit.scores.margni does not exist"),
    ("        - margin\n", "        - margin\n        - margin\n", "tokenexit.scores.margin has 2 places"),
    ("::: tokenexit_torch.wrap\n", "", "tokenexit_torch.wrapping.wrap has no place"),
    ("::: tokenexit_torch.wrap\n", "::: tokenexit_torch.wrapping.wrap\n::: tokenexit_torch.wrap\n",
     "tokenexit_torch.wrapping.wrap has 2 places"),
    ("::: tokenexit_torch.wrap\n", "::: tokenexit_torch.wrap\n\n::: tokenexit_torch.unwrap\n",
     "tokenexit_torch.unwrap does not exist"),
    ("        - margin\n", "        - margin\n        - math\n", "math is not public"),
])  # fmt: skip
def test_a_name_without_its_one_place_is_found(old: str, new: str, complaint: str) -> None:
    before = api_pages()
    assert before.count(old) == 1
    assert complaint in complaints(before.replace(old, new))


def navigation(entry: Any) -> Iterator[str]:
    """The pages in a part of `nav`."""
    if isinstance(entry, str):
        yield entry
    else:
        for part in entry.values() if isinstance(entry, dict) else entry:
            yield from navigation(part)


def test_every_page_is_in_the_navigation_once() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(navigation(nav)) == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_code_that_does_not_run_is_python_all_the_same(page: str) -> None:
    for block in pages.blocks((DOCS / page).read_text(), "py"):
        ast.parse(block.code, page)


RUNNABLE = [page for page in PAGES if pages.blocks((DOCS / page).read_text(), "python")]


def test_how_tos_and_concepts_have_code_that_runs() -> None:
    """All but those of the shell: a cluster's engines are not here."""
    taught = {page for page in PAGES if page.startswith(("howto/", "concepts/", "methods/"))}
    silent = {"howto/cluster.md", "howto/cli.md", "methods/index.md"}
    assert taught - silent | {"index.md", "start/tour.md"} <= set(RUNNABLE)


@pytest.mark.parametrize("page", RUNNABLE)
def test_a_page_says_what_its_blocks_continue(page: str) -> None:
    text = (DOCS / page).read_text()
    if len(pages.blocks(text, "python")) > 1:
        before, _, _ = text.partition("```python")
        assert "run in order, as one script" in " ".join(before.split())
    assert not re.search(r"^\s*(import|from) (examples|tests)\b", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_code_and_output_fit_the_column(page: str) -> None:
    text = (DOCS / page).read_text()
    fenced = "".join(fence["code"] for fence in _FENCE.finditer(text))
    outside = re.sub(r"^!!! .*\n(?: {4}.*\n|\n)*", "", _FENCE.sub("", text), flags=re.MULTILINE)
    indented = re.findall(r"(?<=\n\n)((?: {4}\S.*\n)(?: {4}.*\n|\n(?= {4}))*)", outside)
    lines = [*fenced.splitlines(), *(line.removeprefix("    ") for line in "".join(indented).splitlines())]
    wide = [line for line in lines if len(line) > pages.WIDTH]
    assert wide == [] or page.startswith(("api/", "project/"))


def test_what_is_read_first_is_short() -> None:
    """Start, how-to, concepts and other methods, as `wc -w` counts: code, tables and outputs included."""
    read = [
        page for page in PAGES if page == "index.md" or page.startswith(("start/", "howto/", "concepts/", "methods/"))
    ]
    assert sum(len((DOCS / page).read_text().split()) for page in read) <= 20_000


def test_the_code_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    import_timm()
    fit = functools.partial(tokenexit_torch.fit_exits, steps=3, patches_per_step=64, progress=iter)
    monkeypatch.setattr(tokenexit_torch, "fit_exits", fit)  # the reader's is longer
    fences = _FENCE.finditer((ROOT / "README.md").read_text())
    (code,) = (fence["code"] for fence in fences if fence["language"] == "python")
    with torch.random.fork_rng():
        namespace = {}
        exec(compile(code, "README.md", "exec"), namespace)
    assert namespace["out"].logits.shape == (4, 19, 6, 8)


@pytest.mark.parametrize("page", RUNNABLE)
def test_the_code_of_a_page_runs_and_prints_what_it_says(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_timm()
    module = ModuleType(f"page_{PAGES.index(page)}")  # dataclasses look their module up
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        for block, printed in pages.run(DOCS / page, module):
            assert block.says(printed), f"`python -m tests.website.pages docs/{page}` writes it:\n{printed}"


def test_an_output_that_is_not_what_is_printed_is_found() -> None:
    text = '```python\nprint("a 2.50 b", 3)\n```\n\n```text title="Output"\n{}\n```\n'
    for shown, right in (("a 2.50 b 3", 1), ("a 2.55\nb 3", 1), ("a ... 3", 1), ("a 2.50 b 4", 0), ("a 3.50 b 3", 0)):
        (block,) = pages.blocks(text.format(shown), "python")
        assert block.says("a 2.50 b 3") == right
    (silent,) = pages.blocks("```python\nx = 1\n```\n", "python")
    assert silent.says("")
    assert not silent.says("1")
    ran = [(silent, "1")]
    assert pages.written("```python\nx = 1\n```\n", ran) == '```python\nx = 1\n```\n\n```text title="Output"\n1\n```\n'
