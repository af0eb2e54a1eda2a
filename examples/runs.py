"""Run folders: a trained network with its exits, and what is needed to use it on pictures.

    host.json            which network, classes, colours, normalisation, image size
    host.safetensors     its weights, and its final head's if the exits do not hold it
    exits.json           the plan and the exit heads (tokenexit_torch.save)
    exits.safetensors

Names are looked up in a closed registry; nothing read from a file is executed.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tokenexit_torch as tet
from examples.about import FILE, About
from examples.about import read as read_about
from examples.scenes.vit import Config, PlainHost, ViT
from examples.timm_import import import_timm
from tokenexit import TokenExitError

_WEIGHTS = "host.safetensors"


def normalised(
    about: About, images: Float[Tensor, "*batch 3 height width"], /
) -> Float[Tensor, "*batch 3 height width"]:
    """Images in [0, 1] as a network takes them."""
    mean, std = (images.new_tensor(values)[:, None, None] for values in (about.mean, about.std))
    return (images - mean) / std


def save(folder: str | Path, model: tet.ExitingModel, about: About, /, *, dtype: torch.dtype = torch.float32) -> None:
    """Write a run folder.

    Args:
        folder: Where to; made if it is not there.
        model: The network; its final head must be built by `wrap`.
        about: What to say of it.
        dtype: Of the weights on disk.

    Raises:
        TokenExitError: If its final head was given to `wrap`.
    """
    if not model.built_head:
        raise TokenExitError("`model` must have a final head built by `wrap`, got one that was given")
    folder = Path(folder)
    tet.save(model, folder)
    for file, module in ((_WEIGHTS, model.model), ("exits.safetensors", None)):
        path = folder / file
        weights = load_file(path) if module is None else module.state_dict()
        save_file({name: _cast(value, dtype).contiguous() for name, value in weights.items()}, path)
    (folder / FILE).write_text(json.dumps(asdict(about), indent=2) + "\n", encoding="utf-8")


def load(folder: str | Path, /) -> tuple[tet.ExitingModel, About]:
    """Read a run folder.

    Args:
        folder: Where `save` wrote it.

    Returns:
        The network in evaluation mode, float32, and what the folder says of it.

    Raises:
        TokenExitError: If a file is missing or not what it should be.
    """
    folder = Path(folder)
    about = read_about(folder)
    if about.host not in _HOSTS:
        raise TokenExitError(f"`host` must be one of {sorted(_HOSTS)}, got {about.host!r}")
    try:
        host, module = _HOSTS[about.host](about.config)
        weights = {name: value.float() for name, value in load_file(folder / _WEIGHTS).items()}
        module.load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError, TypeError, ValueError) as error:
        raise TokenExitError(f"`folder` must hold a network as {FILE} says, got {folder}: {error}") from error
    return tet.load(folder, host).eval(), about


@torch.inference_mode()
def bare_dense(model: tet.ExitingModel, images: Float[Tensor, "1 3 height width"]) -> Callable[[Tensor], Tensor]:
    """The baseline: the network as it is without the library, its own forward pass, and the final head.

    Args:
        model: The wrapped network.
        images: An image, to learn how many tokens are no patches.

    Returns:
        A function from images to the logits of their patches.
    """
    prefix = model.host.embed(images).prefix
    return lambda images: model.head(model.host.dense(images)[:, prefix:])


def waiting_for(device: torch.device) -> Callable[[], None]:
    """A function that returns when a device has done what it was given."""
    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None


def _plain(config: Mapping[str, Any]) -> tuple[Any, nn.Module]:
    vit = ViT(Config(**config))
    return PlainHost(vit), vit


def _timm(config: Mapping[str, Any]) -> tuple[Any, nn.Module]:
    # A closed list: other arguments, and names with a scheme, make timm read files or fetch them.
    unknown = sorted(set(config) - _TIMM_ARGUMENTS)
    if unknown or not re.fullmatch(r"\w+", str(config.get("model_name"))):
        raise ValueError(
            f"`config` must have a plain model_name and only {sorted(_TIMM_ARGUMENTS)}, got {dict(config)}"
        )
    vit = import_timm().create_model(**config, pretrained=False)
    return vit, vit


_TIMM_ARGUMENTS = {
    "model_name",
    "patch_size",
    "img_size",
    "num_classes",
    "final_norm",
    "reg_tokens",
    "dynamic_img_size",
}
_HOSTS: dict[str, Callable[[Mapping[str, Any]], tuple[Any, nn.Module]]] = {"plain": _plain, "timm": _timm}


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value
