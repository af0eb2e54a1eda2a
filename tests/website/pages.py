"""Pages of the documentation that run: their code, what it prints, and what the page says that it prints.

A block of ```` ```python ```` runs, all of a page in order and as one script. What a block prints stands right below it:

    ```text title="Output"
    tensor([49, 49])
    ```

where `...` stands for anything, as in doctest: times, paths. Numbers with a point may differ by a tenth: of tokens that
are near a threshold a few leave on one machine and not on another. Blocks of
```` ```py ```` are read and not run. `python -m tests.website.pages docs/howto/fit.md` runs a page and writes what was
printed below each block whose page says something else.
"""

import argparse
import contextlib
import doctest
import io
import os
import re
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from tests.timm_import import import_timm

WIDTH = 80
"""Characters of a line of code or output that a page has room for."""

DOCS = Path(__file__).parents[2] / "docs"

_FENCE = re.compile(
    r"^```(?P<language>\w*)(?P<options>[^\n]*)\n(?P<code>.*?)^```$"
    r'(?P<output>\n\n?```text title="Output"\n(?P<printed>.*?)^```$)?',
    re.MULTILINE | re.DOTALL,
)
_NUMBER = re.compile(r"\d+\.\d+")
_TOLERANCE = 0.1
_OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """Code of a page, and what the page says that it prints.

    Attributes:
        code: On the lines that it has in the page, for tracebacks.
        printed: What the page shows below; None if it shows nothing.
        end: Where its fence ends in the text, the output left out.
        stop: Where its output ends; `end` if there is none.
    """

    code: str
    printed: str | None
    end: int
    stop: int

    def says(self, printed: str) -> bool:
        """Whether the page shows this, or nothing where nothing was printed."""
        if self.printed is None or not printed.strip():
            return self.printed is None and not printed.strip()
        if doctest.OutputChecker().check_output(self.printed, printed, _OPTIONS):
            return True
        shown, found = (_NUMBER.findall(text) for text in (self.printed, printed))
        words = (" ".join(_NUMBER.sub("#", text).split()) for text in (self.printed, printed))
        return len(set(words)) == 1 and all(map(_close, map(float, shown), map(float, found)))


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= _TOLERANCE * max(abs(one), abs(other))


def blocks(text: str, language: str) -> list[Block]:
    """The blocks of a page in one language."""
    found = []
    for fence in _FENCE.finditer(text):
        if fence["language"] == language:
            code = "\n" * text.count("\n", 0, fence.start("code")) + fence["code"]
            start = fence.start("output") if fence["output"] else fence.end()
            found.append(Block(code, fence["printed"], start, fence.end()))
    return found


def run(page: Path, module: ModuleType) -> Iterator[tuple[Block, str]]:
    """Each block of a page with what it prints, run in the namespace of `module`."""
    for block in blocks(page.read_text(), "python"):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(block.code, str(page), "exec"), module.__dict__)
        yield block, "\n".join(line.rstrip() for line in printed.getvalue().rstrip().split("\n"))


def wrapped(line: str) -> str:
    """A line of output in lines that a page has room for; white space is not compared."""
    indent = " " * (len(line) - len(line.lstrip()))
    options = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": indent}
    return textwrap.fill(line, WIDTH, **options) if len(line) > WIDTH else line


def written(text: str, ran: list[tuple[Block, str]]) -> str:
    """The page with what its blocks have printed."""
    for block, printed in reversed(ran):
        if not block.says(printed):
            shown = "\n".join(map(wrapped, printed.split("\n")))
            output = f'\n\n```text title="Output"\n{shown}\n```' if printed.strip() else ""
            text = text[: block.end] + output + text[block.stop :]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description="Run pages, and write below each block what it prints.")
    parser.add_argument("pages", nargs="+", type=Path, help="pages, as docs/howto/fit.md")
    import_timm()
    for page in parser.parse_args().pages:
        page = page.resolve()
        module = ModuleType(f"page_{page.stem}")
        sys.modules[module.__name__] = module
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            ran = list(run(page, module))
        text = page.read_text()
        page.write_text(written(text, ran))
        wrong = sum(not block.says(printed) for block, printed in ran)
        sys.stdout.write(f"{os.path.relpath(page)}: {len(ran)} blocks, {wrong} outputs written\n")


if __name__ == "__main__":
    main()
