"""`tokenexit show`: where the tokens of a picture left, in words and drawn."""

import argparse
from pathlib import Path

import torch

import tokenexit_torch as tet
from tokenexit.errors import TokenExitError
from tokenexit_cli._models import exiting, images_dtype, placed_on, speed_of
from tokenexit_cli._pictures import UNREADABLE, colours, prepared, read
from tokenexit_cli.network import load

__all__ = ["run"]


def run(given: argparse.Namespace) -> int:
    """Run a picture, say what was done, and draw it.

    Args:
        given: The command line.

    Returns:
        0.

    Raises:
        TokenExitError: If something that was given is not what it must be.
    """
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    try:
        picture = read(given.image)
    except UNREADABLE as error:
        raise TokenExitError(f"`IMAGE` must be a picture, got {str(given.image)!r}: {error}") from error
    network = load(given.network)
    device = placed_on(given.device)
    model = exiting(network, given.exits, speed_of(given), device)
    with torch.inference_mode():
        output = model(prepared(network, picture)[None].to(device, images_dtype(model)))
    file = Path(f"{given.image.stem}_exits.png") if given.out is None else given.out
    try:
        tet.show(colours(network, picture), output, file)
    except (OSError, ValueError) as error:  # of matplotlib, for a folder that is not there and an ending unknown to it
        if isinstance(error, TokenExitError):
            raise
        raise TokenExitError(f"`--out` must be a file that can be drawn, got {str(file)!r}: {error}") from error
    print(output.summary())
    print(f"Drawn to {file}.")
    return 0
