"""How the tests are built: none stands on another, and those of the library stand on no example."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
OF_THE_LIBRARY = ("core", "torch", "jax", "cli")


def imported(source: str, package: tuple[str, ...]) -> Iterator[str]:
    """Dotted names of what a file imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            start = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{start}.{one.name}" for one in node.names)


def complaints(source: str, file: Path) -> list[str]:
    """What is wrong with the imports of a file, whose path begins in the folder of the tests."""
    names = sorted(imported(source, ("tests", *file.parts[:-1])))
    tests = [name for name in names if name.startswith("tests.") and ".test_" in name]
    examples = [name for name in names if name.partition(".")[0] == "examples" and file.parts[0] in OF_THE_LIBRARY]
    return [f"{file} imports {name}" for name in sorted({*tests, *examples})]


def test_no_test_is_imported_and_no_test_of_the_library_imports_examples() -> None:
    files = sorted(HERE.rglob("*.py"))
    assert len(files) > 100
    assert [one for file in files for one in complaints(file.read_text(), file.relative_to(HERE))] == []


@pytest.mark.parametrize(("file", "source", "name"), [
    ("core/test_ledger.py", "from tests.core.test_policies import PLAIN", "tests.core.test_policies.PLAIN"),
    ("torch/models.py", "from tests.torch import models, test_masks", "tests.torch.test_masks"),
    ("torch/compiling.py", "import tests.torch.test_running", "tests.torch.test_running"),
    ("jax/gated.py", "from . import test_gating", "tests.jax.test_gating"),
    ("jax/gated.py", "from ..torch.test_masks import lively", "tests.torch.test_masks.lively"),
    ("jax/networks.py", "def embed():\n    from examples.scenes.vit import positions", "examples.scenes.vit.positions"),
    ("torch/models.py", "import examples.scenes.vit", "examples.scenes.vit"),
])  # fmt: skip
def test_such_an_import_is_found(file: str, source: str, name: str) -> None:
    assert complaints(source, Path(file)) == [f"{file} imports {name}"]


def test_other_imports_are_right() -> None:
    assert complaints("from examples.camvid import test", Path("examples/test_camvid.py")) == []
    assert complaints("from tests.torch import models\nimport torch.testing", Path("jax/test_running.py")) == []
