"""What exits gain on a GPU: measured part by part, for as many minutes as there are; called again, it goes on.

    python -m tests.benchmarks.gpu --device cuda --minutes 10 --out gpu-report
    python -m tests.benchmarks.gpu --minutes 0 --out gpu-report    # the tables alone, without the device

A part is a network, a size of images and a batch, the most important first; it has a file of its own in the folder. In
a part, those contenders are timed in turn that run as many token-blocks and run in the same way, in a new order every
round: a group. Each group is written when it is done, and a group that was begun is finished; so leave a compiled one
some minutes beyond those given. Networks and drawn exits are those of `throughput`. Contenders are

- `dense`: the network itself, and its head;
- `limit`: the same blocks on as many tokens, in a plain batch of images that all keep the same: no exit heads, no
  policy, no gather, no scatter;
- `truncated`: the network cut short after as many blocks as make about the same token-blocks;
- `packed`: exits in one packed row, by the rule of DToP and by that of neighbours;
- `static`: exits with a fixed number of entries, those of the fullest image;

and `compiled`, packed between two exits, each of the others as one program, on CUDA in a CUDA graph; there `dense` is
timed both ways.

Beside the time of a pass stand the waits for the device in it, the kernels that it runs and how often the host launches
one or a whole graph, and the peak of memory, weights among it. What does not fit into memory says so.
"""

import argparse
import gc
import itertools
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from time import monotonic
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

import tokenexit_torch as tet
from examples import merging, shell
from tests.benchmarks import gpu_tables
from tests.benchmarks.clock import interleaved
from tests.benchmarks.contenders import (
    Dense,
    Limit,
    Network,
    Rule,
    cut_short,
    dtop,
    following,
    launched,
    neighbours,
    network,
    setting,
    versions,
)
from tests.benchmarks.gpu_tables import Result, Row
from tests.timm_import import import_timm

T = TypeVar("T")
Call = Callable[[Tensor], Any]

RULES: Mapping[str, Rule] = {"DToP": dtop, "neighbours": neighbours}
SPREAD = 0.3  # images keep so much more or less than the mean
CLASSES = 19


@dataclass(frozen=True)
class Part:
    """A network, a size of images and a batch.

    Attributes:
        host: A ViT of timm.
        size: Side of an image, in pixels.
        batch: Images.
        depth: Blocks; the network's own if None.
    """

    host: str
    size: int
    batch: int
    depth: int | None = None

    @property
    def name(self) -> str:
        """What it is called in files and tables."""
        return f"{self.host}-{self.size}px-batch{self.batch}"


@dataclass(frozen=True)
class Group:
    """Contenders that are timed in turn.

    Attributes:
        mode: How they run.
        keep: The share of the token-blocks that runs.
    """

    mode: Literal["eager", "compiled"]
    keep: float

    @property
    def name(self) -> str:
        """What it is called in files and tables."""
        return f"{self.mode} {self.keep:g}"


@dataclass(frozen=True)
class Scale:
    """How much there is to measure.

    Attributes:
        parts: The parts, the most important first.
        groups: Of each part, in their order.
        dtype: Of weights and images.
        rounds: Rounds of a group.
        at_least: Seconds for which short passes are repeated in a round.
    """

    parts: tuple[Part, ...]
    groups: tuple[Group, ...]
    dtype: str
    rounds: int
    at_least: float


def _ordered() -> tuple[Part, ...]:
    """All parts: one for each kind of use first, and the others by their work."""
    first = [("base", 512, 8), ("large", 1024, 8), ("small", 512, 1), ("base", 1024, 32), ("large", 512, 1)]
    every = itertools.product(("base", "large", "small"), (512, 1024), (8, 1, 32))
    return tuple(Part(f"vit_{name}_patch16_224", size, batch) for name, size, batch in dict.fromkeys([*first, *every]))


_MODES: tuple[Literal["eager", "compiled"], ...] = ("eager", "compiled")
SCALES = {
    "full": Scale(
        _ordered(),
        tuple(Group(mode, keep) for mode in _MODES for keep in (0.5, 0.3, 0.7)),
        dtype="bfloat16",
        rounds=9,
        at_least=0.1,
    ),
    # For the tests: it says nothing but that all of it runs.
    "toy": Scale(
        tuple(Part("vit_tiny_patch16_224", 64, batch, depth=4) for batch in (2, 1)),
        tuple(Group(mode, 0.5) for mode in _MODES),
        dtype="float32",
        rounds=2,
        at_least=0.0,
    ),
}


@dataclass(frozen=True)
class Contender:
    """What is timed.

    Attributes:
        what: What it is.
        call: A pass, from images to class scores of every patch.
        token_blocks: The share of the token-blocks that runs.
        rule: The rule by which tokens leave; empty if none does.
    """

    what: str
    call: Call
    token_blocks: float
    rule: str = ""


def contenders(of: Network, images: Tensor, group: Group, *, backend: str) -> list[Contender]:
    """The contenders of a group; the first is dense, and one of them the limit."""
    one = setting(group.keep, patches=of.patches, batch=len(images), spread=SPREAD, device=images.device)
    ran, dense = one.token_blocks(of), Dense(of.model, of.prefix)
    depth = max(1, round(group.keep * of.model.depth))
    exits = {name: following(of.model, one.schedule(of, rule=rule)) for name, rule in RULES.items()}
    room = one.capacities(of)
    found = [
        Contender("limit", Limit(of, one.means), ran),
        Contender("truncated", cut_short(of, depth), depth / of.model.depth),
        tome(of, group.keep),
        *(Contender("packed", model, ran, rule) for rule, model in exits.items()),
        *(Contender("static", tet.StaticModel(model, capacities=room), ran, rule) for rule, model in exits.items()),
    ]
    if group.mode == "eager":
        return [Contender("dense", dense, 1.0), *found]
    made = [replace(each, call=compiled(each, backend)) for each in [Contender("dense, compiled", dense, 1.0), *found]]
    return [Contender("dense", dense, 1.0), *made]


def tome(of: Network, keep: float) -> Contender:
    """ToMe, with as many tokens merged in every block as leave this share of the token-blocks."""
    depth, slots = of.model.depth, of.patches + of.prefix
    count = round(2 * (1 - keep) * slots / max(depth - 1, 1))
    network, method = merging.Network(of.model.host, of.model.head), merging.ToMe(count)
    ran = [slots - block * count for block in range(depth)]
    return Contender("ToMe", lambda images: method(network, images).logits, sum(ran) / (depth * slots))


def compiled(contender: Contender, backend: str) -> Call:
    """The pass as a program; of packed rows, the blocks between two exits."""
    if contender.what == "packed":
        return torch.compile(contender.call, dynamic=True, backend=backend)
    if backend != "inductor" or not torch.cuda.is_available():
        return torch.compile(contender.call, fullgraph=True, dynamic=False, backend=backend)
    graph = torch.compile(contender.call, fullgraph=True, dynamic=False, mode="reduce-overhead")

    def replayed(images: Tensor) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # nobody holds what earlier calls have returned
        return graph(images)

    return replayed


@dataclass(frozen=True)
class Failure:
    """Why there is no result."""

    reason: str


def tried(call: Callable[[], T], /) -> T | Failure:
    """What a call returns, or why it could not: for lack of memory, or because it cannot be compiled, say.

    Raises:
        RuntimeError: If the device is in disorder, so that nothing else could be measured.
    """
    try:
        return call()
    except RuntimeError as error:
        lack = any(isinstance(one, torch.OutOfMemoryError) for one in (error, *_causes(error)))
        text = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
        failure = Failure("out of memory" if lack else text)
    release()  # only here: within the handler its traceback holds tensors
    return failure


def _causes(error: BaseException) -> Iterator[BaseException]:
    """What led to an error; a compiler's is not always its cause by the language."""
    inner = getattr(error, "inner_exception", None)
    for cause in {error.__cause__, error.__context__, inner} - {None}:
        yield cause
        yield from _causes(cause)


def release() -> None:
    """Give memory back that nothing holds.

    Raises:
        RuntimeError: If the device is in disorder.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def waits(call: Callable[[], Any]) -> int:
    """How often a call waits for the CUDA device, as far as PyTorch tells."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("called a synchronizing CUDA operation" in str(one.message) for one in seen)


def peak(call: Callable[[], Any]) -> int:
    """Bytes of the CUDA device that a pass takes beyond what is there, at most."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):  # a CUDA graph is recorded in the second pass of all, and needs no memory later
        call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def looked_at(contender: Contender, images: Tensor, *, weights: int) -> Row:
    """A contender warmed up, with all that is known but its time."""
    row = Row(contender.what, contender.rule, contender.token_blocks)

    def call() -> Any:
        return contender.call(images)

    call()
    if not images.is_cuda:
        return row
    memory = weights + peak(call)
    ran = launched(call)
    return replace(
        row,
        waits=waits(call),
        kernels=len(ran.kernels),
        launches=ran.launches,
        attention=tuple(ran.attention),
        memory=memory,
    )


def timed(
    calls: Mapping[int, Callable[[], Any]], scale: Scale, *, wait: Callable[[], Any]
) -> dict[int, list[float] | Failure]:
    """Seconds of each call, round by round; if one fails it drops out, and the others begin anew."""
    left, failed, running = dict(calls), {}, -1

    def noted(number: int) -> None:
        nonlocal running
        running = number
        left[number]()

    while left:
        each = {str(number): lambda number=number: noted(number) for number in left}
        found = tried(lambda each=each: interleaved(each, rounds=scale.rounds, at_least=scale.at_least, wait=wait))
        if not isinstance(found, Failure):
            return failed | {int(number): seconds for number, seconds in found.items()}
        failed[running] = found
        del left[running]
    return failed


@torch.no_grad()
def measured(of: Network, images: Tensor, group: Group, scale: Scale, *, backend: str) -> tuple[Row, ...]:
    """A row for each contender of a group."""
    with programs(group):
        weights = torch.cuda.memory_allocated() if images.is_cuda else 0
        found = contenders(of, images, group, backend=backend)
        rows: list[Row] = []
        for one in found:
            seen = tried(lambda one=one: looked_at(one, images, weights=weights))
            failed = isinstance(seen, Failure)
            rows.append(Row(one.what, one.rule, one.token_blocks, reason=seen.reason) if failed else seen)
        calls = {
            number: lambda one=one: one.call(images)
            for number, (one, row) in enumerate(zip(found, rows, strict=True))
            if row.reason is None
        }
        seconds = timed(calls, scale, wait=torch.cuda.synchronize if images.is_cuda else lambda: None)
        for number, one in seconds.items():
            known = {"reason": one.reason} if isinstance(one, Failure) else {"seconds": tuple(one)}
            rows[number] = replace(rows[number], **known)
    return tuple(rows)


@contextmanager
def programs(group: Group) -> Iterator[None]:
    """Programs of this group alone; running eagerly because there are too many is an error."""
    if group.mode == "eager":
        yield
        return
    from torch._dynamo import config

    torch.compiler.reset()
    with config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch.compiler.reset()


def built(part: Part, scale: Scale, device: torch.device) -> tuple[Network, Tensor]:
    """The network of a part with its exits, and different images."""
    torch.manual_seed(0)
    images = torch.randn(part.batch, 3, part.size, part.size).to(device, getattr(torch, scale.dtype))
    vit = import_timm().create_model(part.host, img_size=part.size, num_classes=0, depth=part.depth)
    with torch.no_grad():
        return network(vit, images, classes=CLASSES), images


def machine(given: argparse.Namespace) -> dict[str, Any]:
    """What results are bound to."""
    return {
        "device": "CPU",
        **versions(given.device),
        "timm": import_timm().__version__,
        "tokenexit": metadata.version("tokenexit"),
        "dtype": SCALES[given.scale].dtype,
        "scale": given.scale,
        "backend": given.backend,
    }


def require_alike(results: Mapping[str, Result], wanted: Mapping[str, Any], folder: Path) -> None:
    """Raise unless all results are of this device and of these versions.

    Raises:
        UsageError: If some are not; it names the file.
    """
    for name, result in results.items():
        names = sorted({*wanted, *result.machine})
        differing = [one for one in names if result.machine.get(one) != wanted.get(one)]
        if differing:
            rule, got = (
                ", ".join(f"{one} {of.get(one)}" for one in differing) for of in (wanted, result.machine)
            )  # fmt: skip
            raise shell.UsageError(f"`--out` must hold results of {rule} alone, got {folder / name}.json of {got}")


def read(folder: Path, scale: Scale) -> dict[str, Result]:
    """What has been measured, by part.

    Raises:
        UsageError: If a file is none of this script's.
    """
    found = {}
    for part in scale.parts:
        path = folder / f"{part.name}.json"
        if path.exists():
            try:
                found[part.name] = Result.from_dict(json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise shell.UsageError(f"`--out` must hold files of this script alone, got {path}") from error
    return found


def write(path: Path, text: str) -> None:
    """A file, whole or not at all."""
    with shell.replacing(path) as file:
        file.write(text.encode())


def has(results: Mapping[str, Result], part: Part, group: Group) -> bool:
    """Whether a group of a part has been measured."""
    return part.name in results and group.name in results[part.name].groups


def measure(
    results: dict[str, Result], pending: Sequence[tuple[Part, Group]], given: argparse.Namespace, about: Mapping
) -> None:
    """Measure what is pending while there is time, and write each group when it is done; `results` grows."""
    scale, until = SCALES[given.scale], monotonic() + 60 * given.minutes
    with shell.progress(total=len(pending), unit="group") as bar:
        for part, groups in itertools.groupby(pending, key=lambda one: one[0]):
            if monotonic() >= until:
                return
            of, images = built(part, scale, given.device)
            for _, group in groups:
                if monotonic() >= until:
                    return
                bar.set_description(f"{part.name}, {group.name}")
                rows = measured(of, images, group, scale, backend=given.backend)
                before = results.get(part.name, Result(about, {}))
                results[part.name] = replace(before, groups={**before.groups, group.name: rows})
                write(given.out / f"{part.name}.json", json.dumps(asdict(results[part.name]), indent=1))
                bar.write(f"{part.name}, {group.name}: measured")
                bar.update()
            del of, images
            release()


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.gpu", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="begin no group later; 0 makes the tables alone (default 10)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-report"), metavar="FOLDER", help="results (default %(default)s)"
    )
    parser.add_argument(
        "--tables", type=Path, metavar="FILE", help="the tables, in Markdown (default: tables.md beside the results)"
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="cuda or cpu (default cuda)")
    parser.add_argument("--scale", choices=SCALES, default="full", help="toy is for tests (default %(default)s)")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="TEXT",
        help='parts and groups with such a name, as "1024px" or "eager"',
    )
    parser.add_argument(
        "--backend", choices=("inductor", "aot_eager", "eager"), default="inductor", help="of torch.compile"
    )
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    given = arguments(words)
    scale = SCALES[given.scale]
    results = read(given.out, scale)
    every = [(part, group) for part in scale.parts for group in scale.groups]
    wanted = [one for one in every if any(text in f"{one[0].name}, {one[1].name}" for text in given.only)]
    pending = [one for one in wanted if not has(results, *one)]
    if given.minutes > 0 and pending:
        if given.device.type == "cuda" and not torch.cuda.is_available():
            raise shell.UsageError("`--device` must be there, got cuda, and PyTorch sees none")
        if given.device.type == "cuda" and given.device.index is not None:
            torch.cuda.set_device(given.device.index)
        about = machine(given)
        require_alike(results, about, given.out)
        given.out.mkdir(parents=True, exist_ok=True)
        measure(results, pending, given, about)
    elif results:
        require_alike(results, next(iter(results.values())).machine, given.out)
    text = gpu_tables.tables(
        results,
        {part.name: [group.name for group in scale.groups] for part in scale.parts},
        command="python -m tests.benchmarks.gpu --device cuda",
    )
    path = given.tables or given.out / "tables.md"
    if results:
        write(path, text)
    left = sum(not has(results, *one) for one in every)
    print(f"{left} of {len(every)} groups are left: call it again to go on." if left else "All is measured.")
    print(f"The tables are in {path}." if results else text.strip())


if __name__ == "__main__":
    shell.exit_with(main)
