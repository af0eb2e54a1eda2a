"""Is it worth it for a model of yours? An answer in minutes, from some dozens of images without labels.

    found = tet.assess(vit, images, head=head)              # or decoder=..., or a wrapped model
    print(found)                                            # the verdict, and a table
    found.page("assessment.html")                           # the same with a plot and exit maps
    model = found.model                                     # wrapped, fitted, on the plan that was chosen
    model.retune(saving=0.4)                                # another target, from what was assessed

Half of the images fit exit heads and merges; the others are run by every contender, and timed here, beside the network
cut short and smaller images.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from tqdm import tqdm

from tokenexit import folders
from tokenexit.adapting import Progress, is_whole, require_share
from tokenexit.assessment import Assessment, Clock, Contender, Ran, exit_blocks, plans_to_try, run_contenders
from tokenexit.carries import Carry, Prediction, Translated
from tokenexit.errors import TokenExitError, require
from tokenexit.guarantees.calibrate import OwnLoss, Risk
from tokenexit.heads import MLP, Translator
from tokenexit.schedule import Merge, Schedule, dense, measured
from tokenexit_torch import _files
from tokenexit_torch._images import in_batches, parted
from tokenexit_torch._modules import evaluating
from tokenexit_torch.assessing.contenders import (
    Compiled,
    Dense,
    Network,
    Planned,
    Scores,
    decoded_scores,
    smaller,
)
from tokenexit_torch.exits.decoder import DecodingModel
from tokenexit_torch.exits.model import ExitingModel
from tokenexit_torch.hosts.given import Features, Reads
from tokenexit_torch.hosts.protocol import embedded_by
from tokenexit_torch.hosts.registry import brings_decoder, decoding_host_of
from tokenexit_torch.pictures import show
from tokenexit_torch.saving import refill, save
from tokenexit_torch.training.fitting import fit_exits
from tokenexit_torch.training.merges import similarities_over
from tokenexit_torch.wrapping import unwrapped_host, wrap, wrap_decoder

__all__ = ["Assessed", "Baseline", "assess", "speed_up"]

Baseline = Literal["truncation", "smaller input", "compiled dense"]
"""What plans are compared with."""

Images = Float[Tensor, "_ channels height width"]
Labels = Integer[Tensor, "_ _ _"]

_SCALES = (0.87, 0.75, 0.66)
_PATCHES_PER_STEP, _STEPS, _STEPS_A_MINUTE, _LEAST_STEPS = 1024, 400, 40, 100
_FOR_MERGES = 16  # images, whose cells are many
_LEAST, _ROUNDS = 4, 15
_BOLD = 0.25
_MAPS = 3
_CHANGED = "pixels that get another class"
_RELATIVE = "change of the output, relative to its spread"


@dataclass(frozen=True, eq=False)
class Assessed:
    """Result of `assess`. `str` is the verdict and the table.

    Attributes:
        model: The wrapped model, fitted; if it was wrapped here, on the plan that was chosen, or dense if none was.
        assessment: What was measured, the verdict, and the plan (`assessment.plan`).
        samples: Some of the images that were run.
    """

    model: ExitingModel | DecodingModel
    assessment: Assessment
    samples: Float[Tensor, "samples channels height width"]

    def __str__(self) -> str:
        """The verdict and the table."""
        return str(self.assessment)

    def plot(self, file: str | Path | None = None, /) -> Any:
        """Draw what contenders change by how fast they are. It needs `matplotlib`.

        Args:
            file: Where to write it; its ending gives the format, as .png or .svg. None: nothing is written.

        Returns:
            The `matplotlib.figure.Figure`.
        """
        from tokenexit.assessment.plot import draw

        return draw(self.assessment, file)

    def page(self, file: str | Path, /) -> None:
        """Write verdict, table, plot and exit maps as one HTML page that needs nothing else. It needs `matplotlib`.

        Args:
            file: Where to.
        """
        from tokenexit.assessment.page import write

        write(self.assessment, file, figures=list(self._figures()))

    @torch.no_grad()
    def _figures(self) -> Iterator[tuple[str, Any]]:
        """Exit maps of some images by the chosen plan, or by the most careful one if none was."""
        options = self.assessment.options
        plan = self.assessment.plan or (options[0].plan if options else None)
        if plan is None:
            return
        model: Any = self.model
        for number, image in enumerate(self.samples):
            with evaluating(model):
                out = model(image[None], schedule=plan)
            yield f"Image {number + 1}: {out.summary()}", show(image, out)


def assess(
    model: Any,
    images: Images | Iterable[Images | tuple[Images, Labels] | list[Tensor]],
    /,
    *,
    head: nn.Module | None = None,
    decoder: nn.Module | None = None,
    taps: Sequence[int] | None = None,
    features: Features = "normalised",
    reads: Reads = "patches",
    labels: Labels | None = None,
    ignore: int = -100,
    risk: Risk | None = None,
    at_most: float = 0.01,
    batch: int | None = None,
    minutes: float = 10.0,
    baselines: Collection[Baseline] = ("truncation", "smaller input"),
    settings: Mapping[str, Schedule] | None = None,
    out: str | Path | None = None,
    progress: Progress = tqdm,
) -> Assessed:
    """Measure how much faster a model becomes with merging and exits, and what it costs, on images of yours, here.

    A bare model is wrapped, and exit heads, or translators under a decoder, are fitted to every second image. The other
    images are run by each contender and compared with the dense network; the best are timed, all in turn. Contenders
    are merges alone, exits alone, exits behind merges, and the `baselines`. No other work should run on the machine.

    Args:
        model: A vision transformer, as for `wrap`, with its head or decoder; a model with a decoder of its own, as for
            `wrap_decoder`; or a wrapped model, whose exit heads are fitted only if nobody has, and whose own plan is
            among the contenders.
        images: Some dozens of images of one size: a tensor, or batches, each of them a tensor or a pair of images and
            labels.
        head: The final head of a bare model, as for `wrap`.
        decoder: Its decoder instead, as for `wrap`.
        taps: Of the decoder, as for `wrap`.
        features: Likewise.
        reads: Likewise.
        labels: Class of every pixel, for a column of mean IoU; with images of one tensor, or in the order of all.
        ignore: Label of pixels that do not count.
        risk: The loss of an image, `Risk("what it is", function)`, as for `calibrate`. If left out, the share of pixels
            that get another class; where a decoder gives no classes, the mean absolute change of its output relative to
            the mean absolute deviation of the dense one, at most 1.
        at_most: Mean loss within which contenders are compared.
        batch: Images of a batch that is timed; as many as come in the first batch of `images` if left out, at most 8.
        minutes: When to stop: exit heads are fitted in fewer steps, fewer images are run, and the boldest plans left
            out, if there is not enough time. One contender of each kind is run in any case.
        baselines: What plans are compared with. `compiled dense` compiles the dense network, which takes a while.
        settings: Plans of yours to be tried as well, by name.
        out: Folder for what an interrupted call has found, which the same call goes on from; at the end it holds
            `assessment.json`, the exits as by `save` in `exits/`, and, if matplotlib is installed, `page.html`.
        progress: Wraps each loop; `tqdm` shows a bar, `iter` shows nothing.

    Returns:
        The wrapped model, and what was found.

    Raises:
        TokenExitError: If the model is not supported, or has neither head nor decoder; there are fewer than four
            images that nothing was fitted to, of one size; `out` holds an assessment of others; or an argument is out
            of range.
    """
    require_share(at_most, "at_most")
    known = set(baselines) <= set(get_args(Baseline))
    require(known, "baselines", f"be some of {', '.join(get_args(Baseline))}", sorted(baselines))
    clock = Clock.of(minutes)
    wrapped, new = _wrapped(model, head, decoder, taps, features, reads)
    given = _gathered(wrapped, images, labels)
    size = given.batch if batch is None else batch
    require(is_whole(size, least=1), "batch", "be a whole number from 1 up", repr(batch))
    folder = None if out is None else Path(out)
    job = _Job(wrapped, given, min(size, len(given.measured)), clock, folder, progress)
    require(batch is None or batch <= len(given.measured), "batch", f"be at most {len(given.measured)}", batch)
    identity = {
        "weights": _files.fingerprint([*wrapped.model.parameters(), *_final(wrapped)]), "images": given.identity,
        "batch": job.batch, "loss": None if risk is None else risk.kind, "labels": given.labelled,
        "baselines": sorted(baselines), "settings": {name: plan.to_dict() for name, plan in (settings or {}).items()},
    }  # fmt: skip
    if folder is not None:
        _require_same(folder / "identity.json", identity)
    job.fit(int(min(_STEPS, max(_LEAST_STEPS, _STEPS_A_MINUTE * minutes))), new=new)
    network, words, loss = _looked_at(wrapped, given, risk)
    chains, notes = job.chains(network, baselines, settings or {}, own=not new)
    found = run_contenders(
        Dense(network),
        chains,
        job.batches,
        at_most=at_most,
        clock=clock,
        loss=loss,
        rounds=_ROUNDS,
        quality=partial(_mean_iou, labels=job.labels, ignore=ignore) if given.labelled else None,
        file=None if folder is None else folder / "measured.json",
        identity=identity | {"contenders": [one.name for chain in chains for one in chain]},
        progress=progress,
    )
    if found.untried:
        notes.append(f"There was no time for: {', '.join(found.untried)}.")
    if found.images < len(given.measured):
        notes.append(f"There was time for {found.images} of {len(given.measured)} images.")
    made = Assessment(
        found.rows, words, at_most, found.images, len(given.fit), job.batch, given.size, network.grid, wrapped.depth,
        _machine(wrapped), tuple(notes),
    )  # fmt: skip
    wrapped.assessed = made.options
    if new:
        wrapped.retune(made.plan or dense())
    result = Assessed(wrapped, made, torch.stack(given.measured[:_MAPS]))
    if folder is not None:
        _written(result, folder)
    return result


def speed_up(
    model: Any,
    images: Images | Iterable[Images | tuple[Images, Labels] | list[Tensor]],
    /,
    *,
    saving: float | None = None,
    changed: float | None = None,
    minutes: float = 10.0,
    **options: Any,
) -> ExitingModel | DecodingModel:
    """Wrap a model, fit its exits, and set it to a target: `assess` and `retune` in one call.

        model = tet.speed_up(vit, images, head=head, saving=0.4)

    Args:
        model: As for `assess`.
        images: As for `assess`.
        saving: Share of the multiply-adds that is to be saved at least, with the least change.
        changed: Instead, the mean loss that is not to be exceeded on half of the images, with the greatest saving.
        minutes: As for `assess`.
        options: What else `assess` takes: `head`, `decoder`, ...

    Returns:
        The wrapped model on the plan for the target. It keeps what was found, for `retune`; `assess` tells how fast.

    Raises:
        TokenExitError: As `assess`, and as `retune` if no plan reaches the target.
    """
    one = (saving is None) != (changed is None)
    require(one, "saving", "be given, or `changed`, and not both", f"{saving!r} and {changed!r}")
    # A chain of plans ends at three times this; for a saving, bold ones are wanted.
    chosen = {"baselines": (), "at_most": _BOLD if changed is None else changed}
    found = assess(model, images, minutes=minutes, **chosen | options)
    found.model.retune(saving=saving, changed=changed)
    return found.model


@dataclass(frozen=True, eq=False)
class _Given:
    """Images that were given, apart.

    Attributes:
        fit: Those that fit exits and merges.
        measured: Those that are run.
        labels: Labels of the latter; empty without any.
        batch: How many came at once.
        identity: A hash of all of them.
    """

    fit: list[Tensor]
    measured: list[Tensor]
    labels: list[Tensor]
    batch: int
    identity: str

    @property
    def size(self) -> tuple[int, int]:
        return (self.measured[0].shape[1], self.measured[0].shape[2])

    @property
    def labelled(self) -> bool:
        return len(self.labels) > 0


def _gathered(model: ExitingModel | DecodingModel, images: Any, labels: Tensor | None) -> _Given:
    """Images, apart: those fitted to before fit what is to be fitted, or else every second one."""
    like = next(model.parameters())
    every: list[Tensor] = []
    known: list[Tensor] = []
    first = 0
    for part in in_batches(images):
        some, label = parted(part)
        first = first or len(some)
        every += some.to(like.device).unbind()
        known += [] if label is None else label.unbind()
    require(not known or labels is None, "labels", "be left out where they come with the images", type(labels).__name__)
    known = known if labels is None else list(labels)
    require(len(known) in (0, len(every)), "labels", f"be of all {len(every)} images", len(known))
    sizes = sorted({tuple(one.shape) for one in every})
    require(len(sizes) <= 1, "images", "be of one size", sizes)
    digests = [_files.digest(one) for one in every]
    seen = set(model.fitted)
    fresh = [at for at, digest in enumerate(digests) if digest not in seen]
    rule = f"be at least {_LEAST} that nothing was fitted to, and better some dozens"
    require(len(fresh) >= _LEAST, "images", rule, f"{len(fresh)} of {len(every)}")
    run = fresh if len(fresh) < len(every) else fresh[::2]
    chosen = set(run)
    return _Given(
        [every[at] for at in range(len(every)) if at not in chosen],
        [every[at] for at in run],
        [known[at] for at in run] if known else [],
        min(first, 8),
        hashlib.sha256("".join(digests).encode()).hexdigest(),
    )


@dataclass(frozen=True, eq=False)
class _Job:
    """What one call works on."""

    model: ExitingModel | DecodingModel
    given: _Given
    batch: int
    clock: Clock
    folder: Path | None
    progress: Progress
    merges: dict[Schedule, tuple[Merge, ...]] = field(default_factory=dict)

    @property
    def batches(self) -> list[Tensor]:
        return list(torch.stack(self.given.measured).split(self.batch))

    @property
    def labels(self) -> list[Tensor]:
        return list(torch.stack(self.given.labels).split(self.batch))

    def fit(self, steps: int, *, new: bool) -> None:
        """Fit exit heads that nobody has fitted; those of an interrupted call are read."""
        model = self.model
        after = [int(block) for block in model.exit_heads]
        kept = None if self.folder is None else self.folder / "exits"
        if new and kept is not None and (kept / "exits.json").is_file():
            refill(model, kept)
            return
        if model.unfitted(after):
            options: dict[str, Any] = {"resume": None if self.folder is None else self.folder / "fit"}
            options |= {"steps": steps, "patches_per_step": _PATCHES_PER_STEP, "progress": self.progress}
            plan = model.schedule
            model.retune(replace(dense(after=after), carry=plan.carry))
            fit_exits(model, torch.stack(self.given.fit).split(self.batch), **options)
            model.retune(plan)
            if new and kept is not None:
                save(model, kept)

    def chains(
        self, network: Network, baselines: Collection[Baseline], settings: Mapping[str, Schedule], *, own: bool
    ) -> tuple[list[list[Contender]], list[str]]:
        """Contenders in chains, and notes on what cannot be compared."""
        model, notes = self.model, list[str]()
        translates = len(model.translated_after) > 0
        carry: Carry = Translated() if translates else Prediction()
        with evaluating(model), torch.no_grad():
            embedded = embedded_by(model.host, self.given.measured[0][None], patch=model.patch)
        merges = embedded.positions is None or embedded.pairs is not None
        if not merges:
            notes.append("Merging was not tried: the host does not say which half of its positions are sines.")
        heads = [int(block) for block in model.exit_heads]
        rejoins = isinstance(model, DecodingModel) and not translates
        tried = plans_to_try(
            depth=model.depth,
            heads=() if rejoins else heads,  # raw features that rejoin are no use to a decoder
            by="error" if translates and isinstance(model, DecodingModel) else "confidence",
            carry=carry,
            merges=merges,
        )
        chains: list[list[Contender]] = [
            [Planned(network, one.name, one.kind, self.measured(one.plan)) for one in chain]
            for chain in tried
            if chain[0].kind != "truncation" or "truncation" in baselines
        ]
        mine = dict(settings)
        if own and (model.schedule.active or model.schedule.merges):
            mine = {"the model's own plan": model.schedule} | mine
        for name, plan in mine.items():
            model.checked(plan)
            kind = "exits" if not plan.merges else "merging and exits" if plan.active else "merging"
            chains.append([Planned(network, name, kind, self.measured(plan))])
        if "smaller input" in baselines:
            try:
                images = torch.stack(self.given.measured[:1])
                chains.append([smaller(network, images, scale) for scale in _SCALES])
            except (TokenExitError, RuntimeError, ValueError, AssertionError) as error:
                notes.append(f"A smaller input was not tried: {error}")
        if "compiled dense" in baselines:
            chains.append([Compiled(network)])
        return chains, notes

    def measured(self, plan: Schedule) -> Schedule:
        """A plan with similarities in the place of shares, measured on images that fit; exits behind change none."""
        last = max(plan.merged_after, default=0)
        before = replace(plan, exits=tuple(exit for exit in plan.exits if exit.after < last))
        if before not in self.merges:
            part, seen = torch.stack(self.given.fit[:_FOR_MERGES]).split(self.batch), set[str]()
            found = measured(before, similarities_over(self.model, part, seen, progress=iter))
            self.model.fitted = tuple(sorted(seen.union(self.model.fitted)))
            self.merges[before] = found.merges
        return replace(plan, merges=self.merges[before])


def _wrapped(
    model: Any,
    head: nn.Module | None,
    decoder: nn.Module | None,
    taps: Sequence[int] | None,
    features: Features,
    reads: Reads,
) -> tuple[ExitingModel | DecodingModel, bool]:
    """The wrapped model, and whether it was wrapped here."""
    if isinstance(model, ExitingModel | DecodingModel):
        for name, value in (("head", head), ("decoder", decoder), ("taps", taps)):
            require(value is None, name, "be left out for a model that is wrapped", type(value).__name__)
        require(not model.gives_masks, "model", "have heads that read each token by itself", "mask heads")
        return model, False
    if head is None and decoder is None and brings_decoder(model):
        depth = len(decoding_host_of(model).blocks)
        plan = replace(dense(after=exit_blocks(depth)), carry=Translated())
        return wrap_decoder(model, plan, exit_heads=Translator()), True
    rule = "be given, or `decoder`: `assess(vit, images, head=...)`, or a model from `wrap` in the place of `vit`"
    require(head is not None or decoder is not None, "head", rule, "neither")
    depth = len(unwrapped_host(model).blocks)
    after = exit_blocks(depth)
    if decoder is None:
        return wrap(model, dense(after=after), head=head, exit_heads=MLP()), True
    plan = replace(dense(after=after), carry=Translated())
    options: dict[str, Any] = {"taps": taps, "features": features, "reads": reads, "exit_heads": Translator()}
    return wrap(model, plan, decoder=decoder, **options), True


@torch.no_grad()
def _looked_at(
    model: ExitingModel | DecodingModel, given: _Given, risk: Risk | None
) -> tuple[Network, str, OwnLoss | None]:
    """The network on these images, the loss in words, and the loss if it is none of label maps."""
    first = given.measured[0][None]
    anyone: Any = model
    with evaluating(model):
        embedded = embedded_by(model.host, first, patch=model.patch)
        out = anyone(first, schedule=dense())
    scores: Scores | None = decoded_scores(model, out) if isinstance(model, DecodingModel) else lambda out: out.logits
    size = (given.labels[0].shape[0], given.labels[0].shape[1]) if given.labelled else given.size
    require(scores is not None or not given.labelled, "labels", "be left out for a model without classes", "some")
    network = Network(model, scores, size, embedded.grid, embedded.prefix)
    if risk is not None:
        require(
            risk.loss is not None, "risk", "be a loss of your own: Risk(words, function); labels are `labels`", risk
        )
        return network, risk.kind, risk.loss
    if scores is not None:
        return network, _CHANGED, None
    known = isinstance(out.decoded, Tensor) and out.decoded.is_floating_point()
    rule = "be given for a decoder that does not give one tensor: Risk(words, function)"
    require(known, "risk", rule, type(out.decoded).__name__)
    return network, _RELATIVE, _relative_change


def _relative_change(out: Any, dense: Any) -> Float[Tensor, "images"]:
    """Mean absolute change of maps, relative to how far the dense ones are from their own mean, at most 1."""
    map, wanted = out.decoded.flatten(1).float(), dense.decoded.flatten(1).float()
    spread = (wanted - wanted.mean(dim=1, keepdim=True)).abs().mean(dim=1)
    return ((map - wanted).abs().mean(dim=1) / spread.clamp(min=1e-12)).clamp(max=1)


def _mean_iou(seen: Iterable[tuple[int, Ran]], *, labels: Sequence[Tensor], ignore: int) -> float:
    """Mean IoU over the classes that any label has, of all images together."""
    pairs = [(ran.label_maps, labels[number]) for number, ran in seen]
    maps = torch.cat([torch.as_tensor(map).flatten() for map, _ in pairs]).long()
    truth = torch.cat([label.flatten().cpu().long() for _, label in pairs])
    counts = truth != ignore
    maps, truth = maps[counts], truth[counts]
    classes = int(max(maps.max(), truth.max())) + 1 if len(truth) else 1
    confusion = torch.bincount(truth * classes + maps, minlength=classes**2).reshape(classes, classes).double()
    both, either = confusion.diagonal(), confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    there = confusion.sum(1) > 0
    return float((both[there] / either[there]).mean()) if bool(there.any()) else 0.0


def _final(model: ExitingModel | DecodingModel) -> Iterator[Tensor]:
    return model.head.parameters() if isinstance(model, ExitingModel) else iter(())


def _machine(model: ExitingModel | DecodingModel) -> str:
    like = next(model.parameters())
    where = f"CPU, {torch.get_num_threads()} threads"
    if like.device.type == "cuda":
        where = torch.cuda.get_device_name(like.device)
    elif like.device.type != "cpu":
        where = str(like.device)
    return f"{where}, torch {torch.__version__}, {str(like.dtype).removeprefix('torch.')}"


def _require_same(file: Path, identity: Mapping[str, Any]) -> None:
    """Keep what an assessment is of, and raise unless a folder is of the same."""
    text = json.dumps(identity, indent=1, sort_keys=True) + "\n"
    if file.is_file():
        same = file.read_text(encoding="utf-8") == text
        require(same, "out", "be a new folder, or of the same model, images and options", f"{file}, which is of others")
        return
    with folders.replacing(file, argument="out") as part:
        part.write_text(text, encoding="utf-8")


def _written(result: Assessed, folder: Path) -> None:
    save(result.model, folder / "exits")
    with folders.replacing(folder / "assessment.json", argument="out") as part:
        part.write_text(json.dumps(result.assessment.to_dict(), indent=1) + "\n", encoding="utf-8")
    if find_spec("matplotlib") is not None:
        result.page(folder / "page.html")
