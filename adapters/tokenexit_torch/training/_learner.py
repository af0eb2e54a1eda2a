"""Copies of exit heads while they are being fitted, in float32: half precision cannot hold the steps."""

import copy
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from tokenexit.errors import require
from tokenexit.features import FINAL, LAST, TARGET, Rows
from tokenexit.fitting import Missed
from tokenexit.schedule import Schedule
from tokenexit_torch._files import fingerprint, require_weights, specs
from tokenexit_torch._images import Batch, parted
from tokenexit_torch._modules import evaluating
from tokenexit_torch.exits.base import WithExits
from tokenexit_torch.exits.decoder import DecodingModel
from tokenexit_torch.heads.build import TokenTranslator
from tokenexit_torch.heads.reading import translates
from tokenexit_torch.training._imitation import Imitation, log_worst
from tokenexit_torch.training._through import DecoderLoss, change_of

__all__ = ["Learner"]

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_GENERATOR = "generator"

FORETELLING = 0.1
"""Weight of the squared error of foretold logarithms: they must not cost the translations that they are about."""


class Learner:
    """Exit heads of a model with AdamW; the model's own stay as they are until `finish`.

    Args:
        model: The model.
        generator: Draws the patches.
        weight_decay: Of AdamW.
        after: The blocks whose heads are fitted.
        decoder_loss: From the decoder's output and that of the dense network to a loss, for steps through the decoder.
    """

    def __init__(
        self,
        model: WithExits,
        generator: torch.Generator,
        *,
        weight_decay: float,
        after: Sequence[int],
        decoder_loss: DecoderLoss | None = None,
    ) -> None:
        self._model, self._generator, self._decoder_loss = model, generator, decoder_loss
        self._own = {str(block): model.exit_heads[str(block)] for block in after}
        self._heads = nn.ModuleDict(copy.deepcopy(self._own)).float().requires_grad_().train()
        self._weight_decay = weight_decay
        self._optimizer = self._new_optimizer()
        self._kept: dict[str, Tensor] | None = None
        self._imitation = Imitation(model) if any(map(translates, self._own.values())) else None

    @property
    def exits(self) -> tuple[int, ...]:
        """The blocks that the heads follow."""
        return tuple(map(int, self._heads))

    @property
    def marks(self) -> dict[str, str]:
        """What the result depends on beside the rows and the recipe, by name."""
        shapes = repr([(name, tuple(value.shape)) for name, value in self._heads.state_dict().items()])
        heads = hashlib.sha256(shapes.encode()).hexdigest()
        return {"heads": heads, _GENERATOR: fingerprint([self._generator.get_state()])}

    def draw(self, rows: int, size: int, /) -> Tensor:
        """Places of rows, drawn with replacement."""
        return torch.randint(rows, (size,), generator=self._generator, device=self._generator.device)

    def measure(self, chunks: Iterable[Rows], /) -> None:
        """Measure the variance of the tokens that translators are fitted to, if any are."""
        if self._imitation is not None:
            self._imitation.measure(rows[LAST] for rows in chunks)

    def step(self, rows: Rows, rate: float, /) -> None:
        """Take a step."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad()
        self._losses(rows).mean(dim=1).sum().backward()
        self._optimizer.step()

    def step_decoded(self, rows: Rows, batch: Batch, rate: float, /) -> None:
        """Take a step through the decoder."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        images = parted(batch)[0]
        dense = self._dense(images)
        with _exchanged(self._model, self._heads):
            change = self._change(self._model(images).decoded, dense)
        loss = self._losses(rows).mean(dim=1).sum() + change
        parameters = list(self._heads.parameters())
        # What no token has left for at this step has no gradient.
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self._optimizer.step()

    def revert(self) -> None:
        """Go on from the weights that are kept, if any are, with a new optimiser."""
        if self._kept is not None:
            self._heads.load_state_dict(self._kept)
            self._kept = None
        self._optimizer = self._new_optimizer()

    @torch.no_grad()
    def changed(self, batch: Batch, /) -> float:
        """The change of the decoder's output for some images."""
        images = parted(batch)[0]
        with _exchanged(self._model, self._heads), evaluating(self._heads):
            return float(self._change(self._model(images).decoded, self._dense(images)))

    @torch.no_grad()
    def loss(self, rows: Rows, /) -> float:
        """The loss in evaluation mode, summed over rows and heads."""
        with evaluating(self._heads):
            return float(self._losses(rows).sum())

    def keep(self) -> None:
        """Keep the weights as they are now."""
        self._kept = {name: value.clone() for name, value in self._heads.state_dict().items()}

    @torch.no_grad()
    def foretold(self, chunks: Iterable[Rows], /) -> None:
        """Errors that translators foretell are those of images that they were not fitted to: a line through both."""
        translators = {after: head for after, head in self._own.items() if isinstance(head, TokenTranslator)}
        if self._imitation is None or not translators:
            return
        heads = nn.ModuleDict(translators)
        told, found = {after: [] for after in translators}, {after: [] for after in translators}
        with evaluating(heads):
            for rows in chunks:
                device = _device(heads)
                wish = self._imitation.wish(rows[LAST].to(device))
                for after, head in translators.items():
                    translated, log_error = head.foretell(rows[after].to(device))
                    finished, _ = self._imitation.read(translated.float())
                    told[after].append(log_error.double())
                    found[after].append(log_worst(self._imitation.errors(finished, wish)).double())
        with torch.inference_mode(next(heads.parameters()).is_inference()), torch.no_grad():
            for after, head in translators.items():
                slope, offset = _line(torch.cat(told[after]), torch.cat(found[after]))
                head.log_error.weight.mul_(slope)
                head.log_error.bias.mul_(slope).add_(offset)

    def finish(self, digests: frozenset[str], /) -> None:
        """Put the weights that are kept, or the last ones, into the model."""
        heads, weights = nn.ModuleDict(self._own), self._heads.state_dict() if self._kept is None else self._kept
        # Weights that were made in inference mode can be changed in it alone.
        with torch.inference_mode(next(heads.parameters()).is_inference()):
            heads.load_state_dict(weights)
        self._model.fitted = tuple(sorted(digests.union(self._model.fitted)))

    @torch.no_grad()
    def agreed(self, rows: Rows, /) -> dict[int, int]:
        """How many rows the heads of the model give the class of the final head."""
        heads = nn.ModuleDict(self._own)
        final = rows[FINAL].to(_device(heads))
        with evaluating(heads):
            given = {int(after): self._scores(head, rows[after].to(final.device)) for after, head in heads.items()}
        scored = {after: scores for after, scores in given.items() if scores is not None}
        return {after: int((scores.argmax(dim=-1) == final).sum()) for after, scores in scored.items()}

    @torch.no_grad()
    def missed(self, rows: Rows, /) -> dict[int, dict[int, Missed]]:
        """What the translators of the model miss, by tap, summed over rows."""
        if self._imitation is None:
            return {}
        heads = nn.ModuleDict({after: head for after, head in self._own.items() if translates(head)})
        device, found = _device(heads), {}
        wish = self._imitation.wish(rows[LAST].to(device))
        with evaluating(heads):
            for after, head in heads.items():
                finished, _ = self._imitation.read(head(rows[after].to(device)).float())
                each = (self._imitation.errors(finished, wish), self._imitation.variance(finished))
                sums = (one.double().sum(dim=0).tolist() for one in each)
                taps = self._imitation.taps[-finished.shape[1] :]
                found[int(after)] = {tap: Missed(*both) for tap, *both in zip(taps, *sums, strict=True)}
        return found

    def state(self) -> dict[str, Tensor]:
        """Weights, those that are kept, the moments of AdamW, and the generator."""
        moments = {
            f"optimizer.{key}.{name}": value
            for name, parameter in self._heads.named_parameters()
            for key, value in self._optimizer.state.get(parameter, {}).items()
        }
        kept = {} if self._kept is None else self._kept
        return _named("heads", self._heads.state_dict()) | _named("best", kept) | moments | self._drawn()

    def restore(self, state: Mapping[str, Tensor], /, *, kept: bool) -> None:
        """Put back what `state` has given, after a check."""
        weights, parameters = self._heads.state_dict(), dict(self._heads.named_parameters())
        moved = any(name.startswith("optimizer.") for name in state)
        moments = {
            f"optimizer.{key}.{name}": value.new_zeros(()) if key == "step" else value
            for name, value in parameters.items()
            for key in (_MOMENTS if moved else ())
        }
        wanted = _named("heads", weights) | _named("best", weights if kept else {}) | moments
        others = {name: value for name, value in state.items() if name != _GENERATOR}
        require_weights("resume", "hold where this fit is", specs(wanted), others)
        drawn = specs({name: value for name, value in state.items() if name == _GENERATOR})
        require(drawn == specs(self._drawn()), "resume", "hold the state of the generator", "another kind, or none")
        # Copies, for the file is written again while these change.
        found = {name: value.clone() for name, value in state.items()}
        self._heads.load_state_dict({name: found[f"heads.{name}"] for name in weights})
        places = enumerate(parameters if moved else ())
        steps = {at: {key: found[f"optimizer.{key}.{name}"] for key in _MOMENTS} for at, name in places}
        self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": steps})
        self._kept = {name: found[f"best.{name}"].to(value.device) for name, value in weights.items()} if kept else None
        self._generator.set_state(found[_GENERATOR])

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self._heads.parameters(), weight_decay=self._weight_decay)

    @torch.no_grad()
    def _dense(self, images: Tensor) -> Any:
        return self._model(images, schedule=Schedule()).decoded

    def _change(self, found: Any, dense: Any) -> Tensor:
        if self._decoder_loss is not None:
            loss = self._decoder_loss(found, dense)
            scalar = isinstance(loss, Tensor) and loss.ndim == 0
            require(scalar, "decoder_loss", "give a tensor without axes", loss)
            return loss
        assert isinstance(self._model, DecodingModel)
        return change_of(self._model, found, dense)

    def _drawn(self) -> dict[str, Tensor]:
        return {_GENERATOR: self._generator.get_state()}

    def _losses(self, rows: Rows) -> Float[Tensor, "heads rows"]:
        """The loss of each head on each row."""
        device = _device(self._heads)
        wish = rows[TARGET].to(device)
        last = None if self._imitation is None else self._imitation.wish(rows[LAST].to(device))
        found = []
        for after, head in self._heads.items():
            own = rows[after].to(device).float()
            if self._imitation is not None and last is not None and isinstance(head, TokenTranslator):
                translated, log_error = head.foretell(own)
                finished, given = self._imitation.read(translated)
                errors = self._imitation.errors(finished, last)
                loss = errors.mean(dim=-1) + FORETELLING * (log_error - log_worst(errors)).square()
            else:
                given, loss = head(own), 0.0
            found.append(loss if given is None else loss + functional.cross_entropy(given, wish, reduction="none"))
        return torch.stack(found)

    def _scores(self, head: nn.Module, tokens: Tensor) -> Tensor | None:
        """Class scores of a head of the model, those of the final head on what a translator gives; None without any."""
        given = head(tokens)
        return self._imitation.read(given.float())[1] if self._imitation is not None and translates(head) else given


@contextmanager
def _exchanged(model: WithExits, heads: nn.ModuleDict) -> Iterator[None]:
    """Run a model with other exit heads, and with no gradients for its own weights."""
    own, asking = dict(model.exit_heads.items()), [one for one in model.parameters() if one.requires_grad]
    try:
        for one in asking:
            one.requires_grad_(False)
        model.exit_heads.update(dict(heads.items()))
        yield
    finally:
        model.exit_heads.update(own)
        for one in asking:
            one.requires_grad_()


def _line(told: Float[Tensor, "rows"], found: Float[Tensor, "rows"]) -> tuple[float, float]:
    """Slope and offset of the line of least squares; of a slope that is not negative, for larger is to mean larger."""
    spread = told - told.mean()
    squares = float(spread.square().sum())
    slope = max(float((spread * found).sum()) / squares, 0.0) if squares > 0 else 1.0
    return slope, float(found.mean()) - slope * float(told.mean())


def _device(heads: nn.Module) -> torch.device:
    return next(heads.parameters()).device


def _named(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{part}.{name}": value for name, value in tensors.items()}
