"""What is measured under a dense decoder: plans that merge, beside merging of others, smaller images and exits."""

import argparse
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

import tokenexit_torch as tet
from examples import merging, shell
from examples.camvid import baselines, common, data, decoding, evaluate, leaving, report
from examples.camvid.contenders import Runner, Scored, Way
from examples.camvid.decoding import DECODERS
from tokenexit import schedule
from tokenexit.carries import Feature
from tokenexit.policies import NeighboursAgree
from tokenexit.schedule import Merge, Schedule
from tokenexit_torch.hosts.registry import host_of

AFTER, HIDDEN = (1, 2, 3, 4, 6, 8), 384
"""Blocks with an exit head, and how wide these are."""
_TOME = (160, 200)
_GLOBAL = (0.9, 0.85)
_SCALES = (0.87, 0.75)
_EXITS = {3: 2, 6: 1, 8: 0}


def _agreed(after: int, side: int, threshold: float, *, radius: int = 1, alike: float | None = None) -> Merge:
    return Merge(after, side, alike, NeighboursAgree(threshold, radius=radius))


_MERGING = {
    "merge 1 > 0.9, 3 > 0.8": schedule.merged(),
    "merge 2 > 0.8, 4 > 0.8": schedule.merged(alike={2: 0.8, 4: 0.8}),
    "merge 2, 3, 4, 6": Schedule(
        merges=(_agreed(2, 4, 0.5, alike=0.8), _agreed(3, 8, 0.9), _agreed(4, 8, 0.9), _agreed(6, 16, 0.8))
    ),
    "merge 1, 2, 3, 6": Schedule(
        merges=(
            Merge(1, 2, 0.9),
            _agreed(2, 2, 0.5, alike=0.7),
            _agreed(3, 8, 0.9, radius=2),
            _agreed(6, 8, 0.9),
        )
    ),
    "merge 2, 3, 4, 6 (bold)": Schedule(
        merges=(
            _agreed(2, 4, 0.5, alike=0.8),
            _agreed(3, 8, 0.8),
            _agreed(4, 8, 0.8, radius=0),
            _agreed(6, 16, 0.8, radius=0),
        )
    ),
}


@dataclass(frozen=True)
class Planned:
    """A network under a plan, and its decoder.

    Attributes:
        name: Its row in the table.
        kind: Its line in the plot.
        plan: When tokens merge and leave.
    """

    name: str
    kind: str
    plan: Schedule

    @property
    def how(self) -> dict[str, Any]:
        """See `Way.how`."""
        return self.plan.to_dict()

    def on(self, model: tet.DecodingModel, /) -> Runner:
        """See `Way.on`."""
        decoder = model.decoder_multiply_adds()

        def read(out: tet.DecodedOutput) -> Scored:
            work = model.multiply_adds(out) + decoder
            return Scored(decoding.of_pixels(out.decoded), out.tokens_per_block, work)

        return Runner(lambda images: model(images, schedule=self.plan), read)


@dataclass(frozen=True)
class Unmerged:
    """A network whose tokens merge by the rule of others: at every tap each patch has what its token has become.

    Attributes:
        name: Its row in the table.
        kind: Its line in the plot.
        rule: Which tokens merge where.
    """

    name: str
    kind: str
    rule: merging.ToMe | merging.Local

    @property
    def how(self) -> dict[str, Any]:
        """See `Way.how`."""
        return {"baseline": type(self.rule).__name__, **asdict(self.rule)}

    def on(self, model: tet.DecodingModel, /) -> Runner:
        """See `Way.on`."""
        vit, decoder, taps = decoding.parts_of(model)
        network = merging.Network(host_of(vit), nn.Identity(), taps=taps[:-1])
        work = model.decoder_multiply_adds()

        def run(images: Tensor) -> tuple[merging.Pass, Tensor]:
            made = self.rule(network, images)
            return made, decoder(decoding.given([*(made.maps[tap] for tap in taps[:-1]), made.logits]))

        def read(found: tuple[merging.Pass, Tensor]) -> Scored:
            made, scores = found
            return Scored(decoding.of_pixels(scores), made.tokens_per_block, network.multiply_adds(made) + work)

        return Runner(run, read)


class Smaller(baselines.Scaled):
    """The dense network and its decoder on smaller images."""

    @torch.inference_mode()
    def on(self, model: tet.DecodingModel, /) -> Runner:
        """See `Way.on`."""
        vit, decoder, taps = decoding.parts_of(model)
        small, size = baselines.smaller(vit, model.host.embed(_blank(model, data.SIZE)).grid, self.scale)
        dense = tet.wrap(small, schedule.dense(), decoder=decoder, taps=taps).eval()
        out = dense(_blank(model, size))
        work = dense.multiply_adds(out) + dense.decoder_multiply_adds(size)
        whole = decoding.bare(small, decoder, taps)

        def read(scores: Tensor) -> Scored:
            tokens = out.tokens_per_block.expand(len(scores), -1)
            return Scored(decoding.of_pixels(scores), tokens, work.expand(len(scores)))

        return Runner(lambda images: whole(functional.interpolate(images, size, mode="bilinear", antialias=True)), read)


def _blank(model: tet.DecodingModel, size: tuple[int, int]) -> Tensor:
    return next(model.parameters()).new_zeros(1, 3, *size)


def contenders(patches: int) -> tuple[Way[tet.DecodingModel], ...]:
    """Everything that is measured, dense first, for so many patches of an image."""
    counts = dict.fromkeys(baselines.per_block(count, patches) for count in _TOME)
    raw = replace(schedule.neighbours(radius=_EXITS, threshold=0.9, per_class=5), carry=Feature())
    return (
        Planned("dense", "dense", schedule.dense()),
        *(Planned(name, "merging", plan) for name, plan in _MERGING.items()),
        Planned("exits 3, 6, 8 at 0.9, raw features", "exits, raw features", raw),
        *(Unmerged(f"ToMe, {count} a block", "ToMe", merging.ToMe(count)) for count in counts),
        *(
            Unmerged(
                f"local, then global merging above {above}", "local, then global merging",
                merging.Local(above, **baselines.GLOBAL_BLOCKS),
            )
            for above in _GLOBAL
        ),
        *map(Smaller, _SCALES),
    )  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser, /) -> None:
    """Add what `evaluate` takes besides data, network, threads and device."""
    parser.add_argument("--run", type=Path, required=True, help="run folder of the decoders")
    parser.add_argument("--decoder", choices=DECODERS, required=True, help="which of them")
    parser.add_argument("--fitted", type=Path, help="translators of examples.camvid.translators, instead of exit heads")
    parser.add_argument("--json", type=Path, required=True, help="results; what it holds is not measured again")
    parser.add_argument("--split", choices=data.SPLITS, default="val")
    parser.add_argument("--limit", type=int, help="use only this many images, spread evenly over the split")
    parser.add_argument("--plans", type=Path, nargs="*", default=[], metavar="FILE", help="schedules as JSON, as well")
    parser.add_argument("--only", nargs="+", metavar="START", help="only dense, and rows whose name starts like this")
    parser.add_argument("--batches", type=int, nargs="+", default=[4], help="batch sizes to time")
    parser.add_argument("--rounds", type=int, default=5, help="timing rounds; 0 skips timing")
    parser.add_argument("--timing-images", type=int, default=16, help="images of the split that are timed")
    parser.add_argument("--accuracy-batch", type=int, default=4, help="batch size of the accuracy passes")


def check(given: argparse.Namespace, /) -> None:
    """Nothing, if the numbers that were given are possible.

    Raises:
        UsageError: If they are not.
    """
    shell.require_counts(accuracy_batch=given.accuracy_batch, batches=min(given.batches))
    if max(given.batches) > given.timing_images:
        rule = f"be at most --timing-images, {given.timing_images}"
        raise shell.UsageError(f"`--batches` must {rule}, got {max(given.batches)}")
    if given.rounds < 0:
        raise shell.UsageError(f"`--rounds` must be at least 0, got {given.rounds}")


def read_model(
    source: Path, run: Path, name: str, device: torch.device, *, fitted: Path | None = None
) -> tet.DecodingModel:
    """A network under a trained decoder, with the exit heads that were fitted to it.

    Args:
        source: A ready model's `.npz` file.
        run: The run folder of the decoders.
        name: Which of them.
        device: Where to.
        fitted: Other exits; those in the run folder by default.

    Raises:
        UsageError: If there is no such decoder.
        TokenExitError: If the exits in the folder are not what they should be.
    """
    vit = common.ready_model(source, data.SIZE)[0].eval()
    decoder = decoding.new_decoders(vit)[name].eval()
    file = run / f"{name}.safetensors"
    try:
        decoder.load_state_dict(load_file(file))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise shell.UsageError(f"`--run` must hold a decoder of this network, got {str(file)!r}: {error}") from error
    model = tet.wrap(vit, schedule.dense(), decoder=decoder, taps=DECODERS[name].taps)
    return tet.load(model.host, run / name if fitted is None else fitted, kind="decoder").eval().to(device)


def measured(given: argparse.Namespace) -> dict[str, Any]:
    """Measure what the results file lacks, writing it after each row and each batch size.

    Raises:
        UsageError: If data, network, decoder or results do not fit the arguments.
    """
    frames = data.frames(given.data, given.split, given.limit)
    device = torch.device(given.device)
    model = read_model(given.init, given.run, given.decoder, device, fitted=given.fitted)
    identity = {
        "model": given.init.name, "sha256": common.digest(given.init), "decoder": given.decoder,
        "decoder_sha256": common.digest(given.run / f"{given.decoder}.safetensors"),
        "exits": common.digest_of_exits(given.fitted or given.run / given.decoder), "split": given.split,
        "images": len(frames), "device": device.type,
    }  # fmt: skip
    results = evaluate.open_results(given.json, identity)
    given.json.parent.mkdir(parents=True, exist_ok=True)
    patches = evaluate.patch_tokens(model)
    found = (Planned(one.name, one.kind, one.plan) for one in map(evaluate.read_plan, given.plans))
    rows = contenders(patches)
    if given.fitted is not None:
        leaving.require_translators(model.translated_after)
        rows = (rows[0], *(Planned(name, "translated", plan) for name, plan in leaving.by_error().items()))
    dense, *others = (*rows, *found)
    chosen = [dense, *(one for one in others if given.only is None or one.name.startswith(tuple(given.only)))]
    results["about"] = evaluate.environment(device) | {"patch_tokens": patches, "blocks": model.depth}
    evaluate.measure_accuracy(model, chosen, frames, results, given)
    if given.rounds > 0:
        bare = decoding.bare(*decoding.parts_of(model))
        evaluate.measure_time(model, chosen, results, given, bare=bare)
    return results


def show(given: argparse.Namespace) -> None:
    """Measure, and print the table."""
    print(report.table(measured(given)))
