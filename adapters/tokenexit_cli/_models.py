"""From what a function of the user's own has built to a model with exits on its device."""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

import tokenexit_torch as tet
from tokenexit import manifest
from tokenexit.errors import TokenExitError, require
from tokenexit_cli.network import Network

__all__ = ["Exiting", "class_scores", "exiting", "placed_on", "speed_of", "state_of"]

Exiting = tet.ExitingModel | tet.DecodingModel
"""A model with exits."""

_WRAPPED = (tet.ExitingModel, tet.DecodingModel)
_OTHERS = (tet.GatedModel, tet.SemanticModel, tet.StaticModel)


def placed_on(name: str | None, /) -> torch.device:
    """A device that is there.

    Args:
        name: Its name; None for a GPU if there is one, or else the CPU.

    Raises:
        TokenExitError: If PyTorch does not have it here.
    """
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if name is None else name
    try:
        return torch.zeros(1, device=chosen).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = str(error).splitlines()[0]
        raise TokenExitError(f"`--device` must be one that PyTorch has here, got {chosen!r}: {said}") from error


def speed_of(given: argparse.Namespace, /) -> dict[str, float]:
    """What `retune` is to be called with: at most one of saving, changed and threshold."""
    options = {name: getattr(given, name) for name in ("saving", "changed", "threshold")}
    return {name: value for name, value in options.items() if value is not None}


def exiting(network: Network, exits: Path | None, speed: dict[str, float], device: torch.device, /) -> Exiting:
    """The model with exits, in evaluation mode on its device.

    Args:
        network: The network.
        exits: The folder of its exits; None for a model that has them.
        speed: What to retune it with.
        device: Where to.

    Raises:
        TokenExitError: If it has no exits, or twice, they are of another network, or there is no such plan.
    """
    model = network.model
    if isinstance(model, _WRAPPED):
        require(exits is None, "--exits", "be left out for a model that has exits", str(exits))
        for name in ("head", "decoder"):
            given = getattr(network, name)
            require(given is None, name, "be left out for a model that is wrapped", type(given).__name__)
        made = model
    else:
        rule = "be a vision transformer, or wrapped by `wrap` or `wrap_decoder`"
        require(not isinstance(model, _OTHERS), "model", rule, type(model).__name__)
        rule = "be given for a model without exits: a folder that `tokenexit assess` or `tokenexit_torch.save` wrote"
        require(exits is not None, "--exits", rule, "none")
        made = _loaded(network, Path(str(exits)))
    if speed:
        options: Any = speed
        made.retune(**options)
    return made.eval().to(device)


def _loaded(network: Network, exits: Path) -> Exiting:
    if network.head is not None:
        return tet.load(network.model, exits, kind="exits", head=network.head)
    if network.decoder is not None:
        options: Any = {"taps": network.taps, "features": network.features, "reads": network.reads}
        return tet.load(network.model, exits, kind="decoder", decoder=network.decoder, **options)
    saved, _ = manifest.read(exits, "exits")
    # Exits without a final head are of a model with a decoder of its own, as of EoMT.
    return tet.load(network.model, exits, kind="exits" if saved.built_head else "decoder")


def state_of(network: Network, model: Exiting, preparation: str, /) -> dict[str, Any]:
    """What decides what a model says of a picture, as plain data: a run with another one is not gone on with.

    Args:
        network: The network.
        model: It, with exits.
        preparation: What is done to pictures, in words.
    """
    height, width = network.size or (1, 1)  # a function of the user's own is known by its name
    prints = tet.fingerprints(model, resolution=(height, width), preprocessing=preparation)
    weights = json.dumps(dict(sorted(prints.weights.items()))).encode()
    palette = None if network.palette is None else [list(colour) for colour in network.palette]
    return {
        "weights": hashlib.sha256(weights).hexdigest(),
        "plan": repr(model.schedule),
        "preparation": preparation,
        "classes": None if network.classes is None else list(network.classes),
        "palette": palette,
        "dtype": prints.dtype,
    }


def class_scores(
    network: Network, model: Exiting, output: tet.Output | tet.DecodedOutput, /
) -> Float[Tensor, "images classes rows columns"]:
    """Class scores at any resolution, over the area that the grid covers.

    Args:
        network: The network.
        model: It, with exits.
        output: What it returned.

    Raises:
        TokenExitError: If a decoder gives none, or not as many as there are names or colours.
    """
    if isinstance(output, tet.Output):
        scores: Any = output.logits
    elif isinstance(model, tet.DecodingModel) and model.host.classes is not None:
        scores = model.host.class_scores(output.decoded)
    else:
        scores = output.decoded
    images = len(output.exit_depth)
    fits = isinstance(scores, Tensor) and scores.ndim == 4 and len(scores) == images and scores.shape[1] >= 2
    got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
    require(fits, "decoder", f"give class scores of shape ({images}, classes, height, width) for labels", got)
    for name in ("classes", "palette"):
        given = getattr(network, name)
        alike = given is None or len(given) == scores.shape[1]
        require(
            alike,
            name,
            f"be as many as the classes of the model, {scores.shape[1]}",
            0 if given is None else len(given),
        )
    return scores.float()


def images_dtype(model: nn.Module, /) -> torch.dtype:
    """The type of numbers that images have for a model."""
    return next(one.dtype for one in model.parameters() if one.is_floating_point())
