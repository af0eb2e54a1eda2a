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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tokenexit_torch as tet
from examples.scenes.vit import Config, PlainHost, ViT
from examples.timm_import import import_timm
from tokenexit import TokenExitError

_ABOUT = "host.json"
_WEIGHTS = "host.safetensors"


@dataclass(frozen=True)
class About:
    """What a run folder says of its network.

    Attributes:
        host: Kind of network: `plain` or `timm`.
        config: Its arguments: fields of `examples.scenes.vit.Config`, or the name and arguments for
            `timm.create_model`.
        classes: Class names, in the order of the logits.
        palette: Colour of each class, (red, green, blue), 0 to 255.
        mean: Mean of the red, green and blue channels of images in [0, 1].
        std: Their standard deviation.
        size: Height and width in pixels that the network was trained for.
    """

    host: str
    config: Mapping[str, Any]
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    size: tuple[int, int]

    def normalised(self, images: Float[Tensor, "*batch 3 height width"]) -> Float[Tensor, "*batch 3 height width"]:
        """Images in [0, 1] as the network takes them."""
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
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
    (folder / _ABOUT).write_text(json.dumps(asdict(about), indent=2) + "\n", encoding="utf-8")


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
    about = _read_about(folder / _ABOUT)
    try:
        host, module = _HOSTS[about.host](about.config)
        weights = {name: value.float() for name, value in load_file(folder / _WEIGHTS).items()}
        module.load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError, TypeError, ValueError) as error:
        raise TokenExitError(f"`folder` must hold a network as {_ABOUT} says, got {folder}: {error}") from error
    return tet.load(folder, host).eval(), about


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


def _read_about(path: Path) -> About:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        about = About(**{name: _tuples(value) for name, value in data.items()})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise TokenExitError(f"`folder` must hold a valid {_ABOUT}, got {path}: {error}") from error
    if about.host not in _HOSTS:
        raise TokenExitError(f"`host` must be one of {sorted(_HOSTS)}, got {about.host!r}")
    return about


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value
