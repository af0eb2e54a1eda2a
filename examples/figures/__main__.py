"""Writes the figures of the documentation, each in a light and a dark colour scheme.

python -m examples.figures --out docs/images
python -m examples.figures --out docs/images --only neighbours cells
"""

import argparse
from pathlib import Path

from examples import figures, shell
from examples.figures.sheet import THEMES

_SUMMARY = (__doc__ or "").partition("\n")[0]


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.figures", description=_SUMMARY)
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder (default %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=sorted(figures.FIGURES), help="these alone")
    return parser.parse_args()


def main() -> None:
    """Run from the command line."""
    given = arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.only or figures.FIGURES:
        files = [figures.draw(name, theme, given.out) for theme in THEMES]
        size = max(file.stat().st_size for file in files)
        print(f"{size / 1000:6.1f} kB  {name}: {figures.FIGURES[name].shows}")


if __name__ == "__main__":
    shell.exit_with(main)
