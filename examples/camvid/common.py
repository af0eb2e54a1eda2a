"""What the CamVid scripts share: vision transformers from timm, weights from `.npz` files, saved networks."""

import argparse
import hashlib
import importlib
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

import tokenexit_torch as tet
from examples import runs, shell
from examples.timm_import import import_timm
from tokenexit import schedule
from tokenexit.heads import MLP
from tokenexit_torch.heads import build

VIT = "vit_tiny_patch16_224"
_UNUSED = ("norm.", "head.", "heads.")


def vit_config(patch: int, size: tuple[int, int]) -> dict[str, Any]:
    """The arguments of `timm.create_model` for a ViT-Tiny that hands its tokens to heads with a norm of their own.

    Args:
        patch: Patch size in pixels.
        size: Image height and width in pixels.

    Raises:
        UsageError: If patches do not divide the size: pages and losses take whole patches for granted.
    """
    if any(side % patch for side in size):
        raise shell.UsageError(f"patches must divide images of {size[0]} x {size[1]} pixels, got a side of {patch}")
    return {"patch_size": patch, "img_size": list(size), "num_classes": 0, "final_norm": False}


def build_vit(patch: int, size: tuple[int, int]) -> nn.Module:
    """A ViT-Tiny with random weights; arguments as for `vit_config`."""
    return import_timm().create_model(VIT, pretrained=False, **vit_config(patch, size))


def read_npz(path: Path, *, argument: str) -> dict[str, Tensor]:
    """Read named arrays as float32 tensors; never unpickles.

    Args:
        path: A `.npz` file with timm's key names.
        argument: The command-line argument that gave `path`, for the error message.

    Raises:
        UsageError: If the file is missing or is not an archive of plain arrays.
    """
    if not path.is_file():
        raise shell.UsageError(f"`{argument}` must be an existing .npz file, got {str(path)!r}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name]).float() for name in archive.files}
    except (ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise shell.UsageError(
            f"`{argument}` must be a .npz file of plain arrays, got {str(path)!r}: {error}"
        ) from error


def load_backbone(vit: nn.Module, weights: Mapping[str, Tensor], *, argument: str) -> None:
    """Copy timm-named weights into `vit`, strictly: every tensor of the model, with its shape, and nothing unknown.

    The file's final norm and heads (`norm.*`, `head.*`, `heads.*`) are not part of such a backbone and are passed over.

    Raises:
        UsageError: Naming the keys that are missing or unknown, or the first shape that does not fit.
    """
    own = vit.state_dict()
    given = {name: value for name, value in weights.items() if not name.startswith(_UNUSED)}
    missing, unknown = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if missing or unknown:
        raise shell.UsageError(
            f"`{argument}` must hold exactly the tensors of {VIT}: missing {missing[:4]} ({len(missing)} in all), "
            f"unknown {unknown[:4]} ({len(unknown)} in all)"
        )
    for name, value in given.items():
        if value.shape != own[name].shape:
            raise shell.UsageError(
                f"`{argument}`: {name!r} must have shape {tuple(own[name].shape)}, got {tuple(value.shape)}"
            )
    vit.load_state_dict(given)


def pretrained_vit(path: Path, patch: int, size: tuple[int, int]) -> nn.Module:
    """A ViT-Tiny for images of `size` from ImageNet weights on a square grid, position embedding resampled.

    Raises:
        UsageError: As for `read_npz` and `load_backbone`.
    """
    vit = build_vit(patch, size)
    weights = read_npz(path, argument="--weights")
    if "pos_embed" in weights:
        weights["pos_embed"] = _resampled(weights["pos_embed"], (size[0] // patch, size[1] // patch))
    load_backbone(vit, weights, argument="--weights")
    return vit


def _resampled(
    positions: Float[Tensor, "1 prefix_and_patches width"], grid: tuple[int, int]
) -> Float[Tensor, "1 prefix_and_new_patches width"]:
    import_timm()
    return importlib.import_module("timm.layers").resample_abs_pos_embed(positions, list(grid), num_prefix_tokens=1)


def ready_model(path: Path, size: tuple[int, int]) -> tuple[nn.Module, nn.Module, dict[int, nn.Module]]:
    """A fine-tuned ViT-Tiny, its final head, and its exit heads by the block they follow.

    They are from one `.npz` file, with the patch size of its patch embedding, or a run folder, which records its own.

    Raises:
        UsageError: As for `read_npz` and `load_backbone`, if the final head is absent or a head incomplete, or those of
            a run folder are of another kind.
        TokenExitError: If a run folder does not hold what it should.
    """
    if path.is_dir():
        run, _ = runs.load(path)
        if not isinstance(run.head_plan, MLP):
            raise shell.UsageError(f"`--init` must be a run with heads.MLP, got {str(path)!r} with {run.head_plan}")
        return run.model, run.head, {int(after): head for after, head in run.exit_heads.items()}
    weights = read_npz(path, argument="--init")
    kernel = weights.get("patch_embed.proj.weight")
    if kernel is None or kernel.ndim != 4:
        raise shell.UsageError(f"`--init` must hold 'patch_embed.proj.weight', got {sorted(weights)[:4]} ...")
    vit = build_vit(kernel.shape[-1], size)
    load_backbone(vit, weights, argument="--init")
    blocks = sorted({int(name.split(".")[1]) for name in weights if name.startswith("heads.")})
    heads = {block: _head(weights, block) for block in blocks}
    depth = len(list(vit.get_submodule("blocks").children()))
    if depth not in heads:
        raise shell.UsageError(f"`--init` must hold the final head, heads.{depth}.*, got heads after {blocks}")
    return vit, heads.pop(depth), heads


def saved_model(source: Path, size: tuple[int, int], *, fitted: Path | None = None) -> tet.ExitingModel:
    """A network with its exits, as it lies on disk; the plan of a ready model is that nothing leaves.

    Args:
        source: A run folder, or a ready model's `.npz` file.
        size: Image height and width in pixels; a run folder has its own.
        fitted: Other exits, as `tokenexit_torch.save` wrote them; the source's own by default.

    Raises:
        UsageError: As for `ready_model`.
        TokenExitError: If a folder does not hold what it should.
    """
    if source.is_dir():
        model = runs.load(source)[0]
        return model if fitted is None else tet.load(model.host, fitted, kind="exits", head=model.head)
    vit, final, heads = ready_model(source, size)
    if fitted is not None:
        return tet.load(vit, fitted, kind="exits", head=final)
    return tet.wrap(vit, schedule.dense(after=sorted(heads)), head=final, exit_heads=heads)


def add_network(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which network is measured, for `saved_model`."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="run folder written by examples.camvid.train")
    source.add_argument("--init", type=Path, help="ready model, a .npz file with timm key names and heads.B.*")
    parser.add_argument("--fitted", type=Path, help="exits that examples.frozen has fitted; its own by default")


def wide_then_narrow(after: Iterable[int]) -> schedule.Schedule:
    """Exits by the neighbourhood rule with a radius of 1, and of 0 at the last."""
    blocks = sorted(after)
    return schedule.neighbours(radius={block: int(block != blocks[-1]) for block in blocks})


def fitted_exits(results: Path) -> Path:
    """Where the exit heads that were fitted for some results are kept: beside their file."""
    return results.with_suffix(".exits")


def digest_of_exits(folder: Path | None) -> str | None:
    """Of exits that were fitted, their plan included; None for none.

    Raises:
        UsageError: If the folder holds none.
    """
    if folder is None:
        return None
    plan = folder / "exits.json"  # it holds the hash of the weights
    if not plan.is_file():
        raise shell.UsageError(f"`--fitted` must be a folder of exits, got {str(folder)!r}")
    return hashlib.sha256(plan.read_bytes()).hexdigest()[:16]


def digest(source: Path) -> str:
    """Of a ready model's file, or of the weights in a run folder."""
    parts = [source] if source.is_file() else sorted(source.glob("*.safetensors"))
    found = hashlib.sha256()
    for part in parts:
        found.update(part.read_bytes())
    return found.hexdigest()[:16]


def _head(weights: Mapping[str, Tensor], block: int) -> nn.Module:
    prefix = f"heads.{block}."
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    try:
        hidden, width = own["1.weight"].shape
        head = build(MLP(hidden), width=width, classes=own["3.weight"].shape[0])
        head.load_state_dict(own)
    except (KeyError, RuntimeError, ValueError) as error:
        raise shell.UsageError(
            f"`--init`: {prefix}* must be LayerNorm 0, Linear 1, GELU 2, Linear 3, got {sorted(own)}: {error}"
        ) from error
    return head
