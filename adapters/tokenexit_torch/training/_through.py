"""How much a decoder's output changes: what translators are fitted by, through the decoder."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tokenexit.errors import require
from tokenexit_torch.exits.decoder import DecodingModel

__all__ = ["DecoderLoss", "change_of"]

DecoderLoss = Callable[[Any, Any], Tensor]
"""From a decoder's output and that of the dense network to a loss, a tensor without axes."""


def change_of(model: DecodingModel, found: Any, dense: Any, /) -> Tensor:
    """The change of a decoder's output.

    For a model whose output has classes, the divergence (Kullback and Leibler) of their probabilities, the mean over
    pixels. For any other, the squared error of each tensor in it, relative to the variance of the dense one, the mean
    over tensors.

    Raises:
        TokenExitError: If there is no tensor of real numbers in the output.
    """
    if model.host.classes is not None:
        one, other = (functional.log_softmax(model.host.class_scores(each).float(), dim=1) for each in (found, dense))
        return functional.kl_div(one, other, reduction="none", log_target=True).sum(dim=1).mean()
    pairs = list(zip(_tensors(found), _tensors(dense), strict=True))
    rule = "be given for a decoder whose output holds no tensor of real numbers"
    require(len(pairs) > 0, "decoder_loss", rule, type(found).__name__)
    floor = torch.finfo(torch.float32).tiny
    parts = [(one.float() - other.float()).square().mean() / (other.float().var() + floor) for one, other in pairs]
    return torch.stack(parts).mean()


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of real numbers in an output, in their order."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.numel() > 1:
            yield output
    elif isinstance(output, Mapping):
        for one in output.values():
            yield from _tensors(one)
    elif isinstance(output, tuple | list):
        for one in output:
            yield from _tensors(one)
