"""`tokenexit calibrate`: the fastest plan that is certified, or none; resumable at any time."""

import argparse
import functools
import json

import torch
from tqdm import tqdm

import tokenexit_torch as tet
from tokenexit import folders
from tokenexit_cli._models import exiting, images_dtype, placed_on
from tokenexit_cli._pictures import Pictures, files_in, words
from tokenexit_cli.network import load

__all__ = ["run"]


def run(given: argparse.Namespace) -> int:
    """Calibrate a network with exits, print the report, and write it.

    Args:
        given: The command line.

    Returns:
        0, whatever is certified.

    Raises:
        TokenExitError: If something that was given is not what it must be, or the folder is of another calibration.
    """
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    names = files_in(given.images, without=given.out)
    network = load(given.network)
    device = placed_on(given.device)
    model = exiting(network, given.exits, {}, device)
    found = tet.calibrate(
        model,
        Pictures(network, given.images, names, given.batch, device, images_dtype(model)),
        at_most=given.alpha,
        confidence=given.confidence,
        preprocessing=words(network),
        resume=given.out / "measured",
        progress=functools.partial(tqdm, leave=False, disable=None),
    )
    out = given.out
    for name, content in (("report", found.report.to_dict()), ("drift", found.before.to_dict())):
        folders.write(out / f"{name}.json", (json.dumps(content, indent=1) + "\n").encode(), argument="--out")
    found.plot(out / "curve.png")
    files = ["report.json", "drift.json", "curve.png"]
    if found.certificate is not None:
        tet.save_certificate(found.certificate, out)
        files.append("certificate.json")
    print(found)
    print(f"\nWritten to {out}: {', '.join(files)}")
    return 0
