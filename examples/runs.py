"""Run folders: a trained network with its exits, and what is needed to use it on pictures.

    host.json            which network, classes, colours, normalisation, image size
    host.safetensors     its weights, and its final head's if the exits do not hold it
    exits.json           the plan and the exit heads, with a file of weights that it names (tokenexit_torch.save)
    gates.json           instead of exits, the plan and the gates
    semantic.json        instead of these, the plan and the layers of semantic tokens
    head.safetensors     the final head's weights, which gates and semantic tokens do not hold

Names are looked up in a closed registry; nothing read from a file is executed.
"""

import copy
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tokenexit_torch as tet
from examples.about import FILE, About
from examples.about import read as read_about
from examples.scenes.vit import Config, PlainHost, ViT
from examples.timm_import import import_timm
from tokenexit import TokenExitError, surroundings
from tokenexit.cost import of_head
from tokenexit.heads import MLP
from tokenexit_torch.heads import NeighbourhoodHead, build
from tokenexit_torch.hosts.registry import host_of

_WEIGHTS = "host.safetensors"
_HEAD = "head.safetensors"
_GATES = "gates.json"
_SEMANTIC = "semantic.json"


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
    tet.save(copy.deepcopy(model).to(dtype), folder)
    weights = {name: _cast(value, dtype).contiguous() for name, value in model.model.state_dict().items()}
    save_file(weights, folder / _WEIGHTS)
    (folder / FILE).write_text(json.dumps(asdict(about), indent=2) + "\n", encoding="utf-8")


class Segmenter(nn.Module):
    """A network on semantic tokens with a final head that reads the recovered map.

    Attributes:
        model: The network on semantic tokens.
        head: The final head, which reads each token by itself.
    """

    def __init__(self, model: tet.SemanticModel, head: nn.Module) -> None:
        super().__init__()
        self.model, self.head = model, head

    @property
    def host(self) -> tet.Host:
        """The host of the network before it had semantic tokens."""
        return self.model.host

    def forward(self, images: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images classes rows columns"]:
        """Class scores of the patches."""
        return self.read(self.model(images).map)

    def read(self, map: Float[Tensor, "images width rows columns"]) -> Float[Tensor, "images classes rows columns"]:
        """Class scores of a map."""
        return rearrange(self.head(rearrange(map, "i c h w -> i h w c")), "i h w c -> i c h w")

    def dense(self, images: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images width rows columns"]:
        """The map of the network as it was wrapped, every block on all tokens."""
        embedded = self.host.embed(images)
        row = embedded.tokens
        for block in range(self.model.depth):
            row = self.host.run(block, row, None)
        return rearrange(self.host.finish(row)[:, embedded.prefix :], "i (h w) c -> i c h w", h=embedded.grid[0])

    def multiply_adds(self, grid: tuple[int, int], /, *, prefix: int) -> int:
        """Multiply-adds of an image with so many patches down and across, and so many other tokens."""
        head = of_head(MLP(), width=self.host.width, classes=self.head.get_parameter("3.bias").numel())
        return self.model.multiply_adds(grid, prefix=prefix) + head.per_token * grid[0] * grid[1]


def segmentation_head(*, width: int, classes: int) -> nn.Module:
    """The final head that a run with gates has, in the layout of `heads.MLP`."""
    return build(MLP(), width=width, classes=classes)


def save_gated(folder: str | Path, model: tet.GatedModel, about: About, /) -> None:
    """Write a run folder of a network with gates, in float32.

    Args:
        folder: Where to; made if it is not there.
        model: The network; its final head is a `segmentation_head`.
        about: What to say of it.

    Raises:
        TokenExitError: If it has no final head.
    """
    if model.head is None:
        raise TokenExitError("`model` must have a final head, got None")
    folder = Path(folder)
    tet.save(model, folder)
    _save_host(folder, model.host, model.head, about)


def save_semantic(folder: str | Path, model: Segmenter, about: About, /) -> None:
    """Write a run folder of a network on semantic tokens, in float32.

    Args:
        folder: Where to; made if it is not there.
        model: The network; its final head is a `segmentation_head`.
        about: What to say of it.
    """
    folder = Path(folder)
    tet.save(model.model, folder)
    _save_host(folder, model.host, model.head, about)


def _save_host(folder: Path, host: tet.Host, head: nn.Module, about: About) -> None:
    for file, module in ((_WEIGHTS, host.module), (_HEAD, head)):
        save_file({name: value.float().contiguous() for name, value in module.state_dict().items()}, folder / file)
    (folder / FILE).write_text(json.dumps(asdict(about), indent=2) + "\n", encoding="utf-8")


def is_gated(folder: str | Path, /) -> bool:
    """Whether a run folder holds a network with gates."""
    return (Path(folder) / _GATES).is_file()


def is_semantic(folder: str | Path, /) -> bool:
    """Whether a run folder holds a network on semantic tokens."""
    return (Path(folder) / _SEMANTIC).is_file()


def load_gated(folder: str | Path, /) -> tuple[tet.GatedModel, About]:
    """Read a run folder of a network with gates.

    Args:
        folder: Where `save_gated` wrote it.

    Returns:
        The network in evaluation mode, float32, and what the folder says of it.

    Raises:
        TokenExitError: If a file is missing or not what it should be.
    """
    host, about = _host(Path(folder))
    return tet.load(host, folder, kind="gates", head=_head(Path(folder), host, about)).eval(), about


def load_semantic(folder: str | Path, /) -> tuple[Segmenter, About]:
    """Read a run folder of a network on semantic tokens.

    Args:
        folder: Where `save_semantic` wrote it.

    Returns:
        The network in evaluation mode, float32, and what the folder says of it.

    Raises:
        TokenExitError: If a file is missing or not what it should be.
    """
    host, about = _host(Path(folder))
    return Segmenter(tet.load(host, folder, kind="semantic"), _head(Path(folder), host, about)).eval(), about


def load(folder: str | Path, /) -> tuple[tet.ExitingModel, About]:
    """Read a run folder of a network with exits.

    Args:
        folder: Where `save` wrote it.

    Returns:
        The network in evaluation mode, float32, and what the folder says of it.

    Raises:
        TokenExitError: If a file is missing or not what it should be.
    """
    host, about = _host(Path(folder))
    return tet.load(host, folder, kind="exits").eval(), about


def _host(folder: Path) -> tuple[Any, About]:
    about = read_about(folder)
    if about.host not in _HOSTS:
        raise TokenExitError(f"`host` must be one of {sorted(_HOSTS)}, got {about.host!r}")
    try:
        host, module = _HOSTS[about.host](about.config)
        weights = {name: value.float() for name, value in load_file(folder / _WEIGHTS).items()}
        module.load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError, TypeError, ValueError) as error:
        raise TokenExitError(f"`folder` must hold a network as {FILE} says, got {folder}: {error}") from error
    return host, about


def _head(folder: Path, host: Any, about: About) -> nn.Module:
    head = segmentation_head(width=host_of(host).width, classes=len(about.classes))
    try:
        head.load_state_dict(load_file(folder / _HEAD))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise TokenExitError(f"`folder` must hold a final head in {_HEAD}, got {folder}: {error}") from error
    return head


@torch.inference_mode()
def bare_dense(
    model: tet.ExitingModel | tet.GatedModel, images: Float[Tensor, "1 3 height width"]
) -> Callable[[Tensor], Tensor]:
    """The baseline: the network as it is without the library, its own forward pass, and the final head.

    Args:
        model: The wrapped network.
        images: An image, to learn how many tokens are no patches.

    Returns:
        A function from images to the logits of their patches.
    """
    embedded, head = model.host.embed(images), model.head
    prefix, grid = embedded.prefix, embedded.grid
    if head is None:
        raise TokenExitError("`model` must have a final head, got None")
    if isinstance(head, NeighbourhoodHead):
        look = partial(surroundings.beside_all, grid=grid, radius=head.radius)
        return lambda images: head(look(model.host.dense(images)[:, prefix:]))
    return lambda images: head(model.host.dense(images)[:, prefix:])


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
