"""Lines of code of each file in some folders, without blanks, comments and docstrings.

python -m tests.benchmarks.lines adapters/tokenexit_jax
"""

import argparse
import ast
import io
import tokenize
from pathlib import Path

SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def lines(source: str) -> int:
    """Lines that hold code."""
    words: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            words.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    code = {line for one in tokens if one.type not in SILENT for line in range(one.start[0], one.end[0] + 1)}
    return len(code - words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    for folder in parser.parse_args().folders:
        counts = {file: lines(file.read_text()) for file in sorted(folder.rglob("*.py"))}
        for file, count in counts.items():
            print(f"{count:6} {file}")
        print(f"{sum(counts.values()):6} {folder}")


if __name__ == "__main__":
    main()
