"""`tokenexit segment`: a folder of pictures to label PNGs, in as many processes as asked, resumable at any time.

Files are written whole or not at all, so what is there is complete, and is not done again unless its picture is newer.
`segment.json` says which model, exits and options a folder is of; another run is refused there.
"""

import argparse
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Int, Integer
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from tokenexit import folders, sealed
from tokenexit.area import Area
from tokenexit.errors import TokenExitError, require
from tokenexit_cli import network as networks
from tokenexit_cli._models import Exiting, class_scores, exiting, images_dtype, placed_on, speed_of, state_of
from tokenexit_cli._pictures import UNREADABLE, files_in, prepared, read, words
from tokenexit_cli._processes import shared_out
from tokenexit_cli.network import Network
from tokenexit_torch.exits.outputs import upsampled

__all__ = ["run"]

_STATE = "segment.json"
_LABELS, _MAPS = "labels", "exit_maps"
_STRAY = 60.0  # seconds after which what a killed run was writing may be removed
_PART = re.compile(r"\..+\.png\.[0-9]+-[0-9a-f]{8}\.part")
_DARK_TO_BRIGHT = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


@dataclass(frozen=True)
class _Job:
    """A run, as plain data that any process can be sent.

    Attributes:
        network: The module and function that build the network.
        exits: The folder of its exits.
        speed: What it is retuned with.
        device: Where it runs.
        threads: CPU threads of a process; torch's own choice if None.
        images: Folder of pictures.
        out: Folder of results.
        maps: Whether exit maps are written.
        state: What decides on the results (`state_of`); not known yet if None.
    """

    network: str
    exits: Path | None
    speed: Mapping[str, float]
    device: str | None
    threads: int | None
    images: Path
    out: Path
    maps: bool
    state: Mapping[str, Any] | None = None

    def files(self, name: str) -> tuple[Path, ...]:
        """Where the results of a picture are written; its labels last."""
        inside = Path(name).with_suffix(".png")
        return (*((self.out / _MAPS / inside,) if self.maps else ()), self.out / _LABELS / inside)

    def is_done(self, name: str) -> bool:
        """Whether the results of a picture are there, and not older than the picture."""
        try:
            since = (self.images / name).stat().st_mtime_ns
            return all(file.stat().st_mtime_ns >= since for file in self.files(name))
        except OSError:
            return False


@dataclass(frozen=True)
class _Done:
    """What became of some pictures.

    Attributes:
        names: Pictures that were segmented.
        bad: Those that could not be read, and why.
        ran: Tokens that ran, in all blocks of all pictures together.
        whole: Tokens that would have run in the dense network.
    """

    names: tuple[str, ...]
    bad: tuple[tuple[str, str], ...]
    ran: int
    whole: int


def run(given: argparse.Namespace) -> int:
    """Segment all pictures of a folder that are not segmented yet.

    Args:
        given: The command line.

    Returns:
        0, or 1 if some pictures could not be read.

    Raises:
        TokenExitError: If something that was given is not what it must be, or the folder is of another run.
        KeyboardInterrupt: After Ctrl-C, with a line on how to go on.
    """
    started = time.perf_counter()
    names = files_in(given.images, without=given.out)
    _require_apart(names)
    job = _Job(
        given.network, given.exits, speed_of(given), given.device, given.threads, given.images, given.out, given.maps
    )
    # Built here first: whatever is wrong with it is said once, and before any picture is looked at.
    work = _ready(job)
    job = replace(job, state=work.state)
    _claim(job)
    left = [name for name in names if not job.is_done(name)]
    parts = [tuple(left[start : start + given.batch]) for start in range(0, len(left), given.batch)]
    processes = max(1, min(given.processes, len(parts)))
    ready = partial(_given, work)
    if processes > 1:
        threads = max(1, torch.get_num_threads() // processes)
        ready = partial(_ready, replace(job, threads=threads))
        del work  # each of the others has its own
    segmented, bad, ran, whole = 0, [], 0, 0
    before = len(names) - len(left)
    try:
        with (
            closing(shared_out(ready, parts, processes)) as results,  # the processes have ended when it is left
            tqdm(total=len(names), initial=before, unit="picture", disable=None) as bar,
        ):
            for done in results:
                segmented, ran, whole = segmented + len(done.names), ran + done.ran, whole + done.whole
                bad += done.bad
                bar.update(len(done.names) + len(done.bad))
    except KeyboardInterrupt:
        there = sum(map(job.is_done, names))
        raise KeyboardInterrupt(
            f"stopped: {there} of {len(names)} pictures are segmented; run the same command again to go on"
        ) from None
    kept = f" ({before} were there)" if before else ""
    share = (
        f"; blocks ran on {100 * ran / whole:.1f} % of the tokens that the dense network has in them" if whole else ""
    )
    seconds = time.perf_counter() - started
    print(f"{segmented} of {len(names)} pictures segmented{kept} into {given.out}, {seconds:.1f} s{share}.")
    if bad:
        print(f"error: {len(bad)} of {len(names)} pictures cannot be read:", file=sys.stderr)
        print("\n".join(f"  {name}: {why}" for name, why in sorted(bad)), file=sys.stderr)
    return 1 if bad else 0


def _require_apart(names: Sequence[str]) -> None:
    """Raise if the labels of two pictures would be one file."""
    seen: dict[Path, str] = {}
    for name in names:
        other = seen.setdefault(Path(name).with_suffix(""), name)
        require(other == name, "--images", "hold pictures that differ in more than their ending", f"{other} and {name}")


def _claim(job: _Job) -> None:
    """Write down what the folder of results is of, or see that it is of the same; sweep what a killed run left."""
    file, state = job.out / _STATE, {"schema": 1, **(job.state or {})}
    if not file.exists():
        there = [place for place in (_LABELS, _MAPS) if (job.out / place).exists()]
        rule = f"be new, or hold the {_STATE} of the run that it is of"
        require(not there, "--out", rule, f"{job.out} with {' and '.join(there)}, and without it")
        folders.write(file, sealed.seal(state).encode(), argument="--out")
        return
    try:
        before = sealed.unseal(folders.text_of(file, "--out"), argument="--out", what="a run")
    except TokenExitError as error:
        raise TokenExitError(f"`--out` must hold a valid {_STATE}, got {file}: {error}") from error
    other = [name for name in dict.fromkeys((*state, *before)) if before.get(name) != state.get(name)]
    rule = "be new, or of the same model, exits and options: results of two do not mix"
    require(not other, "--out", rule, f"{job.out}, of another run by its {' and '.join(other)}")
    for stray in job.out.rglob(".*.part"):
        try:
            if _PART.fullmatch(stray.name) and time.time() - stray.stat().st_mtime > _STRAY:
                stray.unlink()
        except OSError:  # another run may sweep as well
            continue


def _given(work: "_Segmenting") -> "_Segmenting":
    return work


def _ready(job: _Job) -> "_Segmenting":
    """What segments some pictures, built by the process that calls this.

    Raises:
        TokenExitError: If it cannot be built, or is another network than that of the process before.
    """
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    network = networks.load(job.network)
    model = exiting(network, job.exits, dict(job.speed), placed_on(job.device))
    state = state_of(network, model, words(network))
    rule = "build the same network whenever it is called, as by loading its weights"
    other = [name for name in state if job.state is not None and job.state[name] != state[name]]
    require(not other, "MODULE:FUNCTION", rule, f"{job.network!r}, another one by its {' and '.join(other)}")
    return _Segmenting(job, network, model, state)


@dataclass(frozen=True, eq=False)
class _Segmenting:
    """Segments some pictures, and writes what came out.

    Attributes:
        job: The run.
        network: The network.
        model: It, with exits.
        state: What decides on the results.
    """

    job: _Job
    network: Network
    model: Exiting
    state: Mapping[str, Any]

    def __call__(self, names: tuple[str, ...], /) -> _Done:
        """Segment pictures; those that are shown to the network in one size run together."""
        bad, groups = [], {}
        for name in names:
            try:
                picture = read(self.job.images / name)
            except UNREADABLE as error:
                bad.append((name, " ".join(str(error).split()) or type(error).__name__))
                continue
            image = prepared(self.network, picture)
            groups.setdefault(tuple(image.shape), []).append((name, (picture.height, picture.width), image))
        counts = [self._segment(group) for group in groups.values()]
        good = tuple(name for group in groups.values() for name, _, _ in group)
        return _Done(good, tuple(bad), sum(ran for ran, _ in counts), sum(whole for _, whole in counts))

    @torch.inference_mode()
    def _segment(self, group: Sequence[tuple[str, tuple[int, int], Tensor]]) -> tuple[int, int]:
        """Segment pictures of one size; tokens that ran, and that run in the dense network."""
        like = next(self.model.parameters())
        images = torch.stack([image for _, _, image in group]).to(like.device, images_dtype(self.model))
        output = self.model(images)
        scores = class_scores(self.network, self.model, output)
        for place, (name, size, _) in enumerate(group):
            # One at a time: scores of pixels need more memory than all else.
            label = upsampled(scores[place : place + 1], size, output.area)[0].argmax(dim=0).cpu().numpy()
            drawn = [_label_image(label, scores.shape[1], self.network.palette)]
            if self.job.maps:
                blocks = output.tokens_per_block.shape[1]
                drawn.insert(0, _exit_map(output.exit_depth[place].cpu().numpy(), blocks, size, output.area))
            for file, image in zip(self.job.files(name), drawn, strict=True):
                with folders.replacing(file, argument="--out") as part:
                    image.save(part, format="PNG")
        ran = output.tokens_per_block
        return int(ran.sum()), int(ran.max()) * ran.numel()


def _label_image(
    label: Integer[np.ndarray, "height width"], classes: int, palette: Sequence[Sequence[int]] | None, /
) -> Image.Image:
    """Class indices as an image: with colours where there is a palette, which leave the indices as they are."""
    if classes > 256:
        return Image.fromarray(label.astype(np.uint16))
    image = Image.fromarray(label.astype(np.uint8))
    if palette is not None:
        image.putpalette([part for colour in palette for part in colour])
    return image


def _exit_map(
    depth: Int[np.ndarray, "rows columns"], blocks: int, size: tuple[int, int], area: Area | None, /
) -> Image.Image:
    """How many blocks the patch of each pixel ran through, as an image of these numbers with colours."""
    grid = (depth.shape[0], depth.shape[1])
    per_patch = (size[0] / grid[0], size[1] / grid[1]) if area is None else area.per_patch(grid, size)
    rows, columns = (
        np.minimum((np.arange(side) + 0.5) // pixels, cells - 1).astype(int)
        for side, pixels, cells in zip(size, per_patch, grid, strict=True)
    )
    image = Image.fromarray(depth[rows][:, columns].astype(np.uint8))
    at = np.linspace(0, len(_DARK_TO_BRIGHT) - 1, blocks + 1)
    anchors = np.array(_DARK_TO_BRIGHT).T
    channels = [np.interp(at, np.arange(len(_DARK_TO_BRIGHT)), channel) for channel in anchors]
    image.putpalette(rearrange(np.round(channels).astype(int), "channels blocks -> (blocks channels)").tolist())
    return image
