"""One page on what exits cost and save: HTML in one file, without scripts, for light and for dark screens."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from examples.camvid import data, frontier
from examples.camvid.leavers import Outcome, Picture, Tally, Tokens

Colour = tuple[int, int, int]

_PAGE = Path(__file__).with_name("page.html")
_VOID: Colour = (20, 20, 20)
_TOLD: dict[Outcome, tuple[Colour, str]] = {
    Outcome.AS_DENSE: ((236, 236, 226), "left, as dense says"),
    Outcome.BOTH_WRONG: ((240, 228, 66), "left, as dense says, both wrong by the label"),
    Outcome.LOST: ((213, 94, 0), "left, not as dense says: dense is right"),
    Outcome.GAINED: ((0, 114, 178), "left, not as dense says: the exit is right"),
    Outcome.OTHER: ((204, 121, 167), "left, not as dense says: neither is right, or there is no label"),
}
_WASH = {Outcome.AS_DENSE: 0.45}  # how much the colour covers the photo
_COVER = 0.9
_STRONG = 5.0  # points of IoU that are drawn in full colour
_BELOW = 10.0  # points of mIoU below dense where the frontier ends


@dataclass(frozen=True)
class Content:
    """What the page is about.

    Attributes:
        files: Results by the label of their network.
        file: Label of the network that was looked at.
        setting: Name of the setting that it was looked at with.
        split: What it was looked at on.
        blocks: How many blocks it has.
        tallies: What became of the tokens.
        tokens: Of all images.
        pictures: The images to show.
    """

    files: Mapping[str, frontier.Results]
    file: str
    setting: str
    split: str
    blocks: int
    tallies: Sequence[Tally]
    tokens: Tokens
    pictures: Sequence[Picture]

    @property
    def results(self) -> frontier.Results:
        """Of the network that was looked at."""
        return self.files[self.file]


def render(content: Content) -> str:
    """The whole page."""
    results = content.results
    title = f"{results['inputs']['model']}: {content.setting}"
    return Template(_PAGE.read_text(encoding="utf-8")).substitute(
        title=escape(title),
        split=escape(results["inputs"]["split"]),
        model=escape(results["inputs"]["model"]),
        setting=escape(content.setting),
        figures=_headline(results, content.setting),
        inputs=_inputs(content.files),
        frontier=_frontier(content),
        ring=escape(f"{content.file}: {content.setting}"),
        below=f"{_BELOW:g}",
        settings="".join(_settings(label, content) for label in content.files),
        classes=class_table(results, content.setting),
        counted=f"{len(content.tokens.depth)} images of {escape(content.split)}",
        exits=exit_table(content.tallies, content.blocks),
        legend=_legend(content),
        images="".join(_image(picture, content) for picture in content.pictures),
    )


def _headline(results: frontier.Results, setting: str) -> str:
    dense, entry = results["settings"]["dense"], results["settings"][setting]
    ratio = entry["multiply_adds"] / dense["multiply_adds"]
    tiles = [
        (f"{100 * entry['miou']:.2f}", f"mIoU, %; {100 * (entry['miou'] - dense['miou']):+.2f} against dense"),
        (f"{entry['multiply_adds'] / 1e9:.2f}", f"10⁹ multiply-adds an image; {100 * ratio:.0f} % of dense"),
        (f"{100 * entry['agreement']:.2f} %", "of pixels as dense says"),
    ]
    for batch, timed in results["timing"].items():
        if setting in timed["settings"]:
            speed = timed["settings"][setting]
            ratio = speed["speedup"][1]
            tiles.append((f"{speed['images_per_second'][1]:.2f}", f"images/s, batch {batch}; x{ratio:.2f} of dense"))
    return "".join(f"<div><b>{escape(number)}</b><span>{escape(words)}</span></div>" for number, words in tiles)


def _inputs(files: Mapping[str, frontier.Results]) -> str:
    columns = [_facts(results) for results in files.values()]
    header = _row(["", *files], cell="th")
    return _table(header, [_row([name, *(column[name] for column in columns)]) for name in columns[0]], kind="facts")


def _facts(results: frontier.Results) -> dict[str, str]:
    given, about = results["inputs"], results["about"]
    fitted = "none; trained with the network, or the file's own"
    if given["fit_after"] is not None:
        blocks = ", ".join(map(str, given["fit_after"]))
        fitted = f"after {blocks}, on {given['fit_images'] or 'all'} train images, {given['fit_steps']} steps"
    timed = "; ".join(
        f"batch {batch}: {one['conditions']['rounds']} rounds over {one['conditions']['images']} images"
        for batch, one in results["timing"].items()
    )
    return {
        "network": f"{given['model']} (SHA-256 {given['sha256']}…)",
        "tokens, blocks": f"{about['patch_tokens']:,} patches, {about['blocks']} blocks",
        "images": f"{given['images']} of {given['split']}",
        "exit heads fitted": fitted,
        "device": f"{about['device']}, threads: {about['threads']} on {about['cores']} cores, {about['dtype']}",
        "timing": timed or "none",
        "versions": ", ".join(f"{name} {version}" for name, version in about["versions"].items()),
        "arguments": " ".join(about["arguments"]),
    }


def _frontier(content: Content) -> str:
    light, dark = (_frontier_png(content, ink) for ink in ("#1c1c1a", "#e4e4de"))
    return (
        f'<picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light}" alt="mIoU against multiply-adds and against images a second"></picture>'
    )


def _frontier_png(content: Content, ink: str) -> str:
    file = io.BytesIO()
    frontier.draw(content.files, file, marked=(content.file, content.setting), below=_BELOW, ink=ink, paper="none")
    return _data_uri(file.getvalue())


def _settings(label: str, content: Content) -> str:
    header, *found = frontier.rows(content.files[label])
    chosen = content.setting if label == content.file else None
    body = [_row(row, kind="chosen" if row[0] == chosen else "") for row in found]
    caption = f"<h3>{escape(label)}</h3>" if len(content.files) > 1 else ""
    return caption + _table(_row(header, cell="th"), body)


def class_table(results: frontier.Results, setting: str) -> str:
    """IoU of each class: dense, the truncation of about the same cost, and the setting, with the difference to dense.

    Args:
        results: Where all three are.
        setting: Its name.
    """
    truncation = frontier.truncation_beside(results, setting)
    others = [name for name in (truncation, setting) if name not in (None, "dense")]
    entries = [results["settings"][name] for name in others]
    header = "<th>class</th><th>dense</th>" + "".join(f'<th colspan="2">{escape(name)}</th>' for name in others)
    dense, body = results["settings"]["dense"], []
    swatches = [_swatch(colour) for colour in data.PALETTE]
    for name, swatch in zip(data.CLASSES, swatches, strict=True):
        ious = [entry["iou"][name] for entry in entries]
        body.append(f"<tr><td>{swatch}{escape(name)}</td>{_compared(dense['iou'][name], ious)}</tr>")
    means = _compared(dense["miou"], [entry["miou"] for entry in entries])
    work = "".join(f'<td colspan="2">{entry["multiply_adds"] / 1e9:.2f}</td>' for entry in entries)
    body.append(f'<tr class="chosen"><td>mean</td>{means}</tr>')
    body.append(f"<tr><td>10⁹ multiply-adds</td><td>{dense['multiply_adds'] / 1e9:.2f}</td>{work}</tr>")
    return _table(f"<tr>{header}</tr>", body)


def _compared(dense: float | None, others: Iterable[float | None]) -> str:
    return f"<td>{_percent(dense)}</td>" + "".join(
        f"<td>{_percent(iou)}</td>{_difference(iou, dense)}" for iou in others
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _difference(value: float | None, dense: float | None) -> str:
    if value is None or dense is None:
        return "<td>-</td>"
    away = round(100 * (value - dense), 2) + 0.0  # no -0.00
    sign = "up" if away > 0 else "down"
    strength = round(100 * min(1.0, abs(away) / _STRONG))
    return f'<td class="{sign}" style="--strength:{strength}%">{away:+.2f}</td>'


def exit_table(tallies: Sequence[Tally], blocks: int) -> str:
    """What became of the tokens that left at each exit, of those that never did, and of all.

    Args:
        tallies: By exit.
        blocks: How many the network has.
    """
    every = Tally(0, *(sum(getattr(one, name) for one in tallies) for name in ("tokens", "changed", "lost", "gained")))
    header = ["", "tokens", "not as dense says", "dense right, this wrong", "this right, dense wrong"]
    named = [(f"left after {one.after}" if one.after < blocks else f"ran all {blocks}", one) for one in tallies]
    body = [
        _row(
            [
                name, _shared(one.tokens, every.tokens), _shared(one.changed, one.tokens),
                _shared(one.lost, one.tokens), _shared(one.gained, one.tokens),
            ],
            kind="chosen" if one is every else "",
        )
        for name, one in (*named, ("all", every))
    ]  # fmt: skip
    return _table(_row(header, cell="th"), body)


def _shared(part: int, whole: int) -> str:
    return f"{part:,} ({100 * part / whole:.2f} %)" if whole else f"{part:,}"


def _legend(content: Content) -> str:
    lines = {
        "classes": [*zip(data.PALETTE, data.CLASSES, strict=True), (_VOID, "no label")],
        "blocks run": [(colour, str(depth)) for depth, colour in _ramp(content).items()],
        "wrong tokens": list(_TOLD.values()),
    }
    return "".join(f'<p class="legend"><b>{title}</b>{_named(entries)}</p>' for title, entries in lines.items())


def _named(entries: Iterable[tuple[Colour, str]]) -> str:
    return "".join(f"<span>{_swatch(colour)}{escape(words)}</span>" for colour, words in entries)


def _ramp(content: Content) -> dict[int, Colour]:
    """A colour for each number of blocks that tokens ran through, the brighter the more."""
    from matplotlib import colormaps  # an extra, needed for pages alone

    first, colours = content.tallies[0].after, {}
    for one in content.tallies:
        part = (one.after - first) / (content.blocks - first) if content.blocks > first else 1.0
        red, green, blue = (round(255 * channel) for channel in colormaps["viridis"](part)[:3])
        colours[one.after] = (red, green, blue)
    return colours


def _image(picture: Picture, content: Content) -> str:
    depth, outcome = content.tokens.depth[picture.at], content.tokens.outcome[picture.at]
    left = depth < content.blocks
    share = 100 * left.double().mean().item()
    changed = int((left & (outcome >= Outcome.LOST)).sum())
    ramp = _ramp(content)
    size = picture.photo.shape[1::-1]
    palette = [*data.PALETTE, _VOID]
    views = {
        "photo": picture.photo,
        "label": _coloured(picture.label, palette),
        "dense": _coloured(picture.dense, palette),
        "with exits": _coloured(picture.exiting, palette),
        "blocks run": _large(_coloured(depth, [ramp.get(block, _VOID) for block in range(content.blocks + 1)]), size),
        "wrong tokens": wrong_map(picture.photo, outcome.masked_fill(~left, -1)),
    }
    figures = "".join(
        f'<figure><img src="{_data_uri(_png(pixels))}" alt="{escape(f"{picture.name}, {name}")}">'
        f"<figcaption>{name}</figcaption></figure>"
        for name, pixels in views.items()
    )
    words = f"{share:.1f} % of its {depth.numel():,} tokens left, {changed:,} of them not as dense says"
    return f'<section class="image"><h3>{escape(picture.name)}</h3><p>{words}</p><div>{figures}</div></section>'


def wrong_map(
    photo: UInt8[np.ndarray, "height width 3"], outcome: Int[Tensor, "grid_height grid_width"]
) -> UInt8[np.ndarray, "height width 3"]:
    """The outcome of each token that left, over a darkened grey photo.

    Args:
        photo: The photo.
        outcome: By patch; -1 where the token ran to the end.
    """
    size = (photo.shape[1], photo.shape[0])
    grey = 0.55 * photo.mean(-1, keepdims=True).repeat(3, axis=-1)
    colours = [_TOLD[one][0] for one in Outcome]
    cover = np.array([_WASH.get(one, _COVER) for one in Outcome] + [0.0])[outcome.numpy()]
    over = _large(_coloured(outcome, [*colours, _VOID]), size)
    alpha = _large((255 * cover).round().astype(np.uint8), size)[..., None] / 255
    return ((1 - alpha) * grey + alpha * over).round().astype(np.uint8)


def _coloured(values: Int[Tensor, "height width"], palette: Sequence[Colour]) -> UInt8[np.ndarray, "height width 3"]:
    """Colours by index; -1 is the last."""
    return np.array(palette, dtype=np.uint8)[values.numpy()]


def _large(pixels: UInt8[np.ndarray, "height width *channels"], size: tuple[int, int]) -> UInt8[np.ndarray, "..."]:
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST))


def _png(pixels: UInt8[np.ndarray, "height width 3"]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return file.getvalue()


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _swatch(colour: Colour) -> str:
    return f'<i style="background:rgb{colour}"></i>'


def _row(cells: Iterable[Any], *, cell: str = "td", kind: str = "") -> str:
    """A row of text, which is escaped here."""
    start = f'<tr class="{kind}">' if kind else "<tr>"
    return start + "".join(f"<{cell}>{escape(str(one))}</{cell}>" for one in cells) + "</tr>"


def _table(header: str, body: Iterable[str], *, kind: str = "numbers") -> str:
    return (
        f'<div class="wide"><table class="{kind}"><thead>{header}</thead><tbody>{"".join(body)}</tbody></table></div>'
    )
