"""`tokenexit`: assess, segment, calibrate, show, info."""

import argparse
import importlib
import math
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from tokenexit.errors import TokenExitError

__all__ = ["main"]

_NETWORK = (
    "a function without arguments that returns a tokenexit_cli.Network, as mine:build for `build` in mine.py of the "
    "current folder"
)
_NEEDED = {"torch": "torch", "einops": "torch", "safetensors": "torch", "tqdm": "torch", "PIL": "viz"}
_DRAWN = {"matplotlib": "viz"}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are raised, to be printed as all others are."""

    def error(self, message: str) -> NoReturn:
        raise TokenExitError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Those of the command line; the process's own if left out.

    Returns:
        The exit status: 0; 1 where some pictures could not be read; 2 for a `TokenExitError` and other errors of
        usage; 130 after Ctrl-C.
    """
    try:
        given = _parser().parse_args(arguments)
        for package, extra in given.needs.items():
            if find_spec(package) is None:
                rule = f"have {package}, by `pip install 'tokenexit[{extra}]'`"
                raise TokenExitError(f"`tokenexit {given.command}` must {rule}, got none")
        command = importlib.import_module(f"tokenexit_cli._{given.command}")  # now, for it imports torch
        return command.run(given)
    except TokenExitError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"\n{str(stopped) or 'stopped; run the same command again to go on'}", file=sys.stderr)
        return 130


def _parser() -> _Parser:
    parser = _Parser(prog="tokenexit", description="Early exit and merging of tokens in vision transformers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    assess = commands.add_parser(
        "assess", help="is it worth it for a network? fits exits without labels, measures, and says so",
        description="Fit exits without labels, measure what they save and change beside the network cut short and "
        "smaller images, and say whether it is worth it. Writes assessment.json, page.html and exits/.",
    )  # fmt: skip
    _add_network(assess)
    assess.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of pictures, without labels")
    assess.add_argument("--labels", type=Path, metavar="DIR", help="PNGs of class indices, named as the pictures")
    assess.add_argument("--at-most", type=_share, default=0.01, metavar="SHARE",
                        help="mean change within which plans are compared (default %(default)s)")  # fmt: skip
    assess.add_argument(
        "--ignore", type=int, default=255, metavar="LABEL", help="pixels that do not count (default %(default)s)"
    )
    assess.add_argument("--batch", type=_count, metavar="N", help="images at once when plans are timed (default 8)")
    assess.add_argument("--minutes", type=_positive, default=10.0, help="what it may take (default %(default)g)")
    assess.add_argument("--compiled", action="store_true", help="compare with the compiled dense network too")
    assess.add_argument("--limit", type=_count, metavar="N", help="take so many of the pictures, evenly")
    assess.add_argument("--out", type=Path, default=Path("assessed"), metavar="FOLDER",
                        help="folder of all that is written (default %(default)s)")  # fmt: skip
    assess.set_defaults(needs=_NEEDED)

    segment = commands.add_parser(
        "segment", help="a folder of pictures to label PNGs, by several processes; goes on where it was stopped",
        description="Segment all pictures of a folder and its subfolders, into label PNGs of their own sizes. Stop it "
        "at any time: the same command goes on.",
    )  # fmt: skip
    _add_network(segment)
    _add_exits(segment)
    segment.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of pictures")
    segment.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for labels/ and exit_maps/")
    segment.add_argument("--maps", action="store_true", help="write how many blocks each patch ran through too")
    segment.add_argument("--batch", type=_count, default=1, metavar="N", help="pictures at once (default %(default)s)")
    segment.add_argument("--processes", type=_count, default=1, metavar="N",
                         help="how many share the work, and the threads (default %(default)s)")  # fmt: skip
    _add_speed(segment)
    segment.set_defaults(needs=_NEEDED)

    calibrate = commands.add_parser(
        "calibrate", help="certify the fastest plan whose change is bounded, without labels; goes on where it stopped",
        description="Certify the fastest plan whose mean disagreement with the dense network is bounded, or none. "
        "Writes report.json, certificate.json, curve.png, drift.json. Stop it at any time: the same command goes on.",
    )  # fmt: skip
    _add_network(calibrate)
    _add_exits(calibrate)
    calibrate.add_argument("--images", type=Path, required=True, metavar="DIR",
                           help="folder of pictures to which nothing was fitted")  # fmt: skip
    calibrate.add_argument("--alpha", type=_share, default=0.02, metavar="SHARE",
                           help="mean share of pixels that may change (default %(default)s)")  # fmt: skip
    calibrate.add_argument("--confidence", type=_share, default=0.95, metavar="SHARE",
                           help="that it is no more (default %(default)s)")  # fmt: skip
    calibrate.add_argument("--batch", type=_count, default=8, metavar="N", help="images at once (default %(default)s)")
    calibrate.add_argument("--out", type=Path, default=Path("calibrated"), metavar="FOLDER",
                           help="folder of all that is written (default %(default)s)")  # fmt: skip
    calibrate.set_defaults(needs={**_NEEDED, **_DRAWN})

    show = commands.add_parser(
        "show", help="draw where the tokens of a picture left",
        description="Say and draw where the tokens of a picture left and merged, and what came out.",
    )  # fmt: skip
    _add_network(show)
    _add_exits(show)
    show.add_argument("image", type=Path, metavar="IMAGE", help="a picture")
    show.add_argument("--out", type=Path, metavar="FILE", help="the drawing (default IMAGE_exits.png, here)")
    _add_speed(show)
    show.set_defaults(needs={**_NEEDED, **_DRAWN})

    about = "versions, devices, and what of the library is available"
    info = commands.add_parser("info", help=about, description=f"Print {about}.")
    info.set_defaults(needs={})
    return parser


def _add_network(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("network", metavar="MODULE:FUNCTION", help=_NETWORK)
    parser.add_argument(
        "--device", metavar="D", help="where it runs, as cuda:1; a GPU if there is one, or else the CPU"
    )
    parser.add_argument("--threads", type=_count, metavar="N", help="CPU threads in all; torch's own choice by default")


def _add_exits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--exits", type=Path, metavar="FOLDER", help="what `assess` or `tokenexit_torch.save` wrote")


def _add_speed(parser: argparse.ArgumentParser) -> None:
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--saving", type=float, metavar="S", help="share of the multiply-adds to save, as 0.4")
    speed.add_argument("--changed", type=float, metavar="C", help="mean change that is not to be exceeded, as 0.01")
    speed.add_argument("--threshold", type=float, metavar="T", help="confidence at which tokens leave")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 up, got {text!r}")
    return int(text)


def _share(text: str) -> float:
    return _within(text, "a number between 0 and 1", below=1.0)


def _positive(text: str) -> float:
    return _within(text, "a number above 0", below=math.inf)


def _within(text: str, rule: str, *, below: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < below:
        raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")
    return value
