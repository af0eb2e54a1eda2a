"""Exit heads while they are being fitted, and all that makes up where the fit is."""

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokenexit import TokenExitError
from tokenexit.adapting import is_whole
from tokenexit.errors import require
from tokenexit.folders import require_metadata
from tokenexit_torch._files import read, require_weights, specs, write
from tokenexit_torch._modules import evaluating
from tokenexit_torch.training._features import TARGET, Cached, Rows

__all__ = ["Fit", "Recipe"]

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_WHERE = "where"
_GENERATOR = "generator"


@dataclass(frozen=True)
class Recipe:
    """How heads are fitted; `fit_exits` says what the fields are."""

    steps: int
    patches_per_step: int
    learning_rate: float
    weight_decay: float
    held_out: float
    check_every: int
    patience: int

    def rate_at(self, step: int) -> float:
        """The learning rate: a cosine that would be zero after the last step."""
        return self.learning_rate * (1 + math.cos(math.pi * step / self.steps)) / 2


class _Best(NamedTuple):
    loss: float
    step: int
    weights: dict[str, Tensor]


class Fit:
    """Heads that are being fitted: copies in float32, for half precision cannot hold the steps.

    Args:
        heads: The heads as they are at first; they stay so.
        recipe: How to fit them.
        generator: Draws the patches.

    Attributes:
        step: How many steps have been taken.
    """

    def __init__(self, heads: nn.ModuleDict, recipe: Recipe, generator: torch.Generator) -> None:
        self.recipe, self.generator, self.step = recipe, generator, 0
        self._heads = copy.deepcopy(heads).float().requires_grad_().train()
        self._optimizer = torch.optim.AdamW(self._heads.parameters(), weight_decay=recipe.weight_decay)
        self._best: _Best | None = None
        self._checks_since = 0

    @property
    def stopped(self) -> bool:
        """Whether the loss of the images held out has not become better for too long."""
        return self._checks_since >= self.recipe.patience

    @property
    def due(self) -> bool:
        """Whether it is time for a check."""
        return self.step % self.recipe.check_every == 0 or self.step == self.recipe.steps

    @property
    def kept(self) -> tuple[dict[str, Tensor], int]:
        """The best weights, and the steps that led there; the last ones, if no image is held out."""
        best = self._best
        return (self._heads.state_dict(), self.step) if best is None else (best.weights, best.step)

    def learn(self, rows: Rows) -> None:
        """Take a step on some rows; if there are none, it changes nothing."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.recipe.rate_at(self.step)
        if len(rows[TARGET]) > 0:
            self._optimizer.zero_grad()
            torch.stack(self._losses(rows, "mean")).sum().backward()
            self._optimizer.step()
        self.step += 1

    @torch.no_grad()
    def check(self, held_out: Cached) -> None:
        """Look at the mean loss of the heads on rows held out, and keep the weights if it was never better."""
        total, patches = 0.0, 0
        with evaluating(self._heads):
            for rows in held_out.chunks():
                total += float(torch.stack(self._losses(rows, "sum")).sum())
                patches += len(rows[TARGET])
        loss = total / (patches * len(self._heads))
        if loss < (math.inf if self._best is None else self._best.loss):
            weights = {name: value.clone() for name, value in self._heads.state_dict().items()}
            self._best, self._checks_since = _Best(loss, self.step, weights), 0
        else:
            self._checks_since += 1

    def write(self, file: Path, marks: Mapping[str, str], /) -> None:
        """Write where the fit is, for `go_on`."""
        best = None if self._best is None else (self._best.loss, self._best.step)
        where = json.dumps({"step": self.step, "checks_since": self._checks_since, "best": best})
        write(file, self._tensors(), {**marks, _WHERE: where}, argument="resume")

    def go_on(self, file: Path, marks: Mapping[str, str], /) -> None:
        """Be where a fit was.

        Raises:
            TokenExitError: If it was another fit, or the file is not valid.
        """
        tensors, found = read(file, "resume")
        require_metadata("resume", file, marks, found)
        try:
            where = _Where.of(json.loads(found.get(_WHERE, "")), self.recipe)
            # Copies, for the file is written again while these change.
            self._restore({name: value.clone() for name, value in tensors.items()}, where)
        except (ValueError, RecursionError) as error:
            raise TokenExitError(f"`resume` must hold a valid {file.name}, got {file}: {error}") from error

    def _losses(self, rows: Rows, reduction: str) -> list[Tensor]:
        device = next(self._heads.parameters()).device
        wish = rows[TARGET].to(device)
        return [
            functional.cross_entropy(head(rows[after].to(device).float()), wish, reduction=reduction)
            for after, head in self._heads.items()
        ]

    def _tensors(self) -> dict[str, Tensor]:
        best = {} if self._best is None else self._best.weights
        moments = {
            f"optimizer.{key}.{name}": value
            for name, parameter in self._heads.named_parameters()
            for key, value in self._optimizer.state.get(parameter, {}).items()
        }
        return (
            {f"heads.{name}": value for name, value in self._heads.state_dict().items()}
            | {f"best.{name}": value for name, value in best.items()}
            | moments
            | {_GENERATOR: self.generator.get_state()}
        )

    def _restore(self, tensors: Mapping[str, Tensor], where: "_Where") -> None:
        weights = self._heads.state_dict()
        parameters = dict(self._heads.named_parameters())
        moved = any(name.startswith("optimizer.") for name in tensors)
        moments = {
            f"optimizer.{key}.{name}": value.new_zeros(()) if key == "step" else value
            for name, value in parameters.items()
            for key in (_MOMENTS if moved else ())
        }
        wanted = (
            {f"heads.{name}": value for name, value in weights.items()}
            | {f"best.{name}": value for name, value in weights.items() if where.best is not None}
            | moments
        )
        others = {name: value for name, value in tensors.items() if name != _GENERATOR}
        require_weights("resume", "hold where this fit is", specs(wanted), others)
        self._heads.load_state_dict({name: tensors[f"heads.{name}"] for name in weights})
        state = {
            index: {key: tensors[f"optimizer.{key}.{name}"] for key in _MOMENTS}
            for index, name in enumerate(parameters if moved else ())
        }
        self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": state})
        self.step, self._checks_since = where.step, where.checks_since
        if where.best is not None:
            loss, step = where.best
            kept = {name: tensors[f"best.{name}"].to(value.device) for name, value in weights.items()}
            self._best = _Best(loss, step, kept)
        drawn = tensors.get(_GENERATOR)
        now = self.generator.get_state()
        fits = drawn is not None and drawn.dtype == now.dtype and drawn.shape == now.shape
        require(fits, "resume", "hold the state of the generator", "another kind, or none")
        self.generator.set_state(now if drawn is None else drawn)


class _Where(NamedTuple):
    """Where a fit is, its tensors aside."""

    step: int
    checks_since: int
    best: tuple[float, int] | None

    @staticmethod
    def of(data: Any, recipe: Recipe) -> "_Where":
        """What a file says, after a check of types and ranges."""
        names = {"step", "checks_since", "best"}
        require(isinstance(data, dict) and set(data) == names, "where", f"have the keys {sorted(names)}", repr(data))
        for name, most in (("step", recipe.steps), ("checks_since", recipe.patience)):
            inside = is_whole(data[name]) and data[name] <= most
            require(inside, name, f"be a whole number from 0 to {most}", repr(data[name]))
        best = data["best"]
        if best is None:
            return _Where(data["step"], data["checks_since"], None)
        pair = isinstance(best, list) and len(best) == 2 and isinstance(best[0], float) and math.isfinite(best[0])
        pair = pair and is_whole(best[1]) and best[1] <= data["step"]
        require(pair, "best", f"be a loss and a step from 0 to {data['step']}", repr(best))
        return _Where(data["step"], data["checks_since"], (best[0], best[1]))
