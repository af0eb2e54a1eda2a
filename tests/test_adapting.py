"""Adapters stand on the core's public names alone, and no package imports itself in a circle."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from tokenexit import TokenExitError, adapting

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "tokenexit": ROOT / "tokenexit",
    "tokenexit_torch": ROOT / "adapters" / "tokenexit_torch",
    "tokenexit_jax": ROOT / "adapters" / "tokenexit_jax",
    "tokenexit_cli": ROOT / "adapters" / "tokenexit_cli",
}


def imports(source: str) -> Iterator[tuple[str, str | None]]:
    """Every module that a file imports, and the name out of it, wherever in the file and for whatever purpose."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from ((str(node.module), alias.name) for alias in node.names)


def private_names(source: str) -> list[str]:
    """What a file takes of the core that starts with an underscore: modules, and names and attributes of modules."""
    found, aliases = [], {"tokenexit"}
    for module, name in imports(source):
        whole = module if name is None else f"{module}.{name}"
        if module.split(".")[0] == "tokenexit":
            found += [whole] if any(part.startswith("_") for part in whole.split(".")) else []
            aliases |= {name} if name is not None else set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            owner = ast.unparse(node.value)
            found += [f"{owner}.{node.attr}"] if owner.split(".")[0] in aliases else []
    return found


def graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Which modules each module imports, of those that there are; imports for type checkers count as well."""
    found = {}
    for module, source in sources.items():
        named = {f"{one}.{name}" if f"{one}.{name}" in sources else one for one, name in imports(source)}
        found[module] = {one for one in named if one in sources and one != module}
    return found


def circles(arrows: Mapping[str, set[str]]) -> set[tuple[str, ...]]:
    """Groups of modules that reach each other, each in alphabetical order."""
    reached = {module: {module} for module in arrows}
    grown = True
    while grown:
        grown = False
        for module, seen in reached.items():
            more = seen.union(*(arrows[one] for one in seen))
            grown |= more != seen
            reached[module] = more
    alike = {module: tuple(sorted(one for one in seen if module in reached[one])) for module, seen in reached.items()}
    return {group for group in alike.values() if len(group) > 1}


def files(package: str) -> dict[str, str]:
    """The files of a package by the names of their modules."""
    folder, found = PACKAGES[package], {}
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder).with_suffix("").parts
        found[".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])] = file.read_text()
    assert len(found) > 10
    return found


@pytest.mark.parametrize("package", ["tokenexit_torch", "tokenexit_jax"])
def test_an_adapter_takes_no_private_name_of_the_core_and_nothing_of_the_other_adapter(package):
    for module, source in files(package).items():
        assert private_names(source) == [], module
        others = {one.split(".")[0] for one, _ in imports(source)} & set(PACKAGES)
        assert others <= {"tokenexit", package}, module


def test_the_command_line_takes_no_private_name_of_the_core_and_nobody_takes_anything_of_it():
    """It stands on the PyTorch adapter, in those modules alone that are imported when a command runs a network."""
    for module, source in files("tokenexit_cli").items():
        assert private_names(source) == [], module
        others = {one.split(".")[0] for one, _ in imports(source)} & set(PACKAGES)
        early = module.rpartition(".")[2] in ("tokenexit_cli", "__main__", "main", "network", "_info", "_processes")
        assert others <= {"tokenexit", "tokenexit_cli"} | (set() if early else {"tokenexit_torch"}), module
    sources = [source for package in PACKAGES if package != "tokenexit_cli" for source in files(package).values()]
    assert not any(one.split(".")[0] == "tokenexit_cli" for source in sources for one, _ in imports(source))


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_imports_itself_in_a_circle(package):
    assert circles(graph(files(package))) == set()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from tokenexit._plain import is_whole", ["tokenexit._plain.is_whole"]),
        ("import tokenexit._array", ["tokenexit._array"]),
        ("from tokenexit import _grid", ["tokenexit._grid"]),
        ("from tokenexit.gates import _sigmoid", ["tokenexit.gates._sigmoid"]),
        ("def late():\n    from tokenexit._plain import MOST", ["tokenexit._plain.MOST"]),
        ("if TYPE_CHECKING:\n    from tokenexit._plain import MOST", ["tokenexit._plain.MOST"]),
        ("from tokenexit import gates\ngates._sigmoid(1)", ["gates._sigmoid"]),
        ("import tokenexit\ntokenexit.gates._sigmoid(1)", ["tokenexit.gates._sigmoid"]),
        ("from tokenexit.gates import soft_draw\nfrom tokenexit_torch._files import read\nself._own", []),
        ("from tokenexit import gates\ngates.__name__", []),
    ],
)
def test_private_names_are_seen(source, found):
    assert private_names(source) == found


def test_circles_are_seen():
    sources = {
        "p": "from p.a import A",
        "p.a": "if TYPE_CHECKING:\n    from p.b import B",
        "p.b": "from p import c",
        "p.c": "def late():\n    import p.a",
        "p.d": "from p.a import A\nimport numpy",
    }
    assert graph(sources) == {"p": {"p.a"}, "p.a": {"p.b"}, "p.b": {"p.c"}, "p.c": {"p.a"}, "p.d": {"p.a"}}
    assert circles(graph(sources)) == {("p.a", "p.b", "p.c")}
    assert circles(graph(sources | {"p.c": ""})) == set()


def test_authors_of_adapters_find_all_of_it_in_one_place():
    for name in adapting.__all__:
        assert getattr(adapting, name) is not None
    assert (adapting.is_whole(3), adapting.is_whole(True), adapting.is_whole(2, least=3)) == (True, False, False)
    assert (adapting.is_number(0.5), adapting.is_number(float("nan"))) == (True, False)
    assert adapting.rates_by_gate(0.5, (2, 4)) == {2: 0.5, 4: 0.5}
    coin = adapting.coin_for(4, rates={2: 0.8, 4: 0.4}, deciding=(2, 4), returning="never")
    assert coin == pytest.approx(0.5)
    assert adapting.aligned(np.ones(3), 2).shape == (1, 3)
    with pytest.raises(TokenExitError, match="`level` must lie between 0 and 1, got 1"):
        adapting.require_share(1, "level")
    with pytest.raises(TokenExitError, match="`valid` must be boolean, got dtype int64"):
        adapting.require_marks(np.ones(3, np.int64), "valid")
