"""`tokenexit assess`: is it worth it for a network?"""

import argparse
import functools

import torch
from torch import nn
from tqdm import tqdm

import tokenexit_torch as tet
from tokenexit.errors import require
from tokenexit_cli._models import images_dtype, placed_on
from tokenexit_cli._pictures import Pictures, files_in, labels
from tokenexit_cli.network import load

__all__ = ["run"]

_AT_ONCE = 8


def run(given: argparse.Namespace) -> int:
    """Assess a network, and print the verdict.

    Args:
        given: The command line.

    Returns:
        0, whatever the verdict.

    Raises:
        TokenExitError: If something that was given is not what it must be.
    """
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    names = files_in(given.images, limit=given.limit, without=given.out)
    network = load(given.network)
    device = placed_on(given.device)
    parts = {"model": network.model, "head": network.head, "decoder": network.decoder}
    for name, part in parts.items():
        module = part if isinstance(part, nn.Module) else getattr(part, "module", None)  # that of a host of one's own
        require(part is None or isinstance(module, nn.Module), name, "be a torch.nn.Module", type(part).__name__)
        if isinstance(module, nn.Module):
            module.eval().to(device)
    module = network.model if isinstance(network.model, nn.Module) else network.model.module
    images = Pictures(network, given.images, names, given.batch or _AT_ONCE, device, images_dtype(module))
    known = None
    if given.labels is not None:
        height, width = next(iter(images)).shape[2:]
        known = labels(given.labels, names, (height, width))
    found = tet.assess(
        network.model,
        images,
        head=network.head,
        decoder=network.decoder,
        taps=network.taps,
        features=network.features,
        reads=network.reads,
        labels=known,
        ignore=given.ignore,
        at_most=given.at_most,
        batch=given.batch,
        minutes=given.minutes,
        baselines=("truncation", "smaller input", *(("compiled dense",) if given.compiled else ())),
        out=given.out,
        progress=functools.partial(tqdm, leave=False, disable=None),
    )
    print(found)
    print(f"\nWritten to {given.out}: assessment.json, page.html, exits/")
    return 0
