"""The frontier of accuracy and cost, as rows and as a plot, from results as `evaluate` writes them."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

Results = Mapping[str, Any]
"""What the JSON file of `evaluate` holds."""
Points = Mapping[str, tuple[float, float]]
"""x and mIoU in percent, by the name of the setting."""

WORK = {"multiply_adds": ("multiply-adds per image, 10⁹", 1e-9), "token_blocks": ("token-blocks (dense = 1)", 1.0)}
"""Label and unit of what counts as work, by its name in the results."""

_STYLES = {
    "dense, compiled": "*",
    "dense": "*-",
    "truncated": "s--",
    "DToP, k = 0": "v-",
    "DToP, k = 5": "^-",
    "neighbours, cells": "D-",
    "neighbours": "o-",
    "PAUMER": "P-",
    "DoViT": "d-",
    "found": "*",
    "ToMe": "h-.",
    "local": "X-.",
    "smaller input": "<-.",
}  # by how the kind begins
_OTHER_STYLE = "x:"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#8a8a8a")
_NEAR = 0.1


def rows(results: Results) -> list[list[str]]:
    """A header, and one row for each setting that has been evaluated; speeds where they have been timed."""
    batches = list(results["timing"])
    dense = results["settings"]["dense"]["miou"]
    sequences = list(results["settings"]["dense"]["miou_by_sequence"])
    parts = sequences if len(sequences) > 1 else []
    header = ["setting", "mIoU", "vs dense", *parts, "token-blocks", "GMACs", "agreement"]
    found = [header + [f"images/s, batch {batch} (x dense)" for batch in batches]]
    for name, entry in results["settings"].items():
        row = [
            name, f"{100 * entry['miou']:.2f}", f"{100 * (entry['miou'] - dense):+.2f}",
            *(f"{100 * entry['miou_by_sequence'][part]:.2f}" for part in parts),
            f"{entry['token_blocks']:.3f}", f"{entry['multiply_adds'] / 1e9:.2f}", f"{100 * entry['agreement']:.2f} %",
        ]  # fmt: skip
        found.append(row + [_speed(results["timing"][batch]["settings"].get(name)) for batch in batches])
    return found


def _speed(entry: Mapping[str, Sequence[float]] | None) -> str:
    if entry is None:
        return "-"
    (low, middle, high), ratio = entry["images_per_second"], entry["speedup"][1]
    return f"{middle:.2f} [{low:.2f}, {high:.2f}] x{ratio:.2f}"


def truncation_beside(results: Results, setting: str) -> str | None:
    """The truncation to compare a setting with.

    Args:
        results: Where both are.
        setting: Its name.

    Returns:
        The most accurate truncation whose multiply-adds are within a tenth of the setting's; the nearest, if there is
        none; None if no truncation has been evaluated.
    """
    work = results["settings"][setting]["multiply_adds"]
    away = {
        name: abs(entry["multiply_adds"] / work - 1)
        for name, entry in results["settings"].items()
        if entry["kind"] == "truncated" and name != setting
    }
    near = [name for name, distance in away.items() if distance <= _NEAR]
    if near:
        return max(near, key=lambda name: results["settings"][name]["miou"])
    return min(away, key=lambda name: away[name], default=None)


def panels(files: Mapping[str, Results], work: Collection[str]) -> dict[str, dict[str, Points]]:
    """What there is to draw: by the label of the x axis, and then by file.

    Speeds of different devices, or with different numbers of threads, do not share a panel.
    """
    found: dict[str, dict[str, Points]] = {}
    for file, results in files.items():
        for label, points in _panels(results, work):
            found.setdefault(label, {})[file] = points
    return found


def _panels(results: Results, work: Collection[str]) -> Iterator[tuple[str, Points]]:
    miou = {name: 100 * entry["miou"] for name, entry in results["settings"].items()}
    for quantity in work:
        label, unit = WORK[quantity]
        yield label, {name: (unit * entry[quantity], miou[name]) for name, entry in results["settings"].items()}
    for batch, timed in results["timing"].items():
        conditions = timed["conditions"]
        label = f"images/s, batch {batch} ({conditions['device']}, threads: {conditions['threads']})"
        speeds = {name: entry["images_per_second"][1] for name, entry in timed["settings"].items()}
        yield label, {name: (speed, miou[name]) for name, speed in speeds.items() if name in miou}


def draw(
    files: Mapping[str, Results],
    target: Path | BinaryIO,
    /,
    *,
    work: Collection[str] = ("multiply_adds",),
    marked: tuple[str, str] | None = None,
    below: float | None = None,
    ink: str = "black",
    paper: str = "white",
) -> None:
    """Draw mIoU against work, and against measured images a second for each batch size that was timed.

    Colours tell kinds of settings apart, or, where there are several files, the files.

    Args:
        files: Results by the label of their network.
        target: A path, .png or .svg, or a file for a PNG.
        work: Which of `WORK` to draw, a panel each.
        marked: File and setting to put a ring around.
        below: How many points below the best dense network the axis ends, unless the ring is lower; where the lowest
            setting is by default.
        ink: Colour of text and axes.
        paper: Colour of the background; "none" for transparent.
    """
    import matplotlib as mpl  # an extra, needed for this alone
    from matplotlib.figure import Figure

    found, colours = panels(files, work), _colours(files, ink)
    inked = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink)
    with mpl.rc_context({**inked, "axes.facecolor": paper, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(5.5 * len(found), 5), layout="constrained")
        axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
        for axis, (label, by_file) in zip(axes, found.items(), strict=True):
            for file, points in by_file.items():
                _draw_points(axis, files[file], points, colours[file])
                if marked is not None and marked[0] == file and marked[1] in points:
                    axis.plot(*points[marked[1]], "o", color=ink, fillstyle="none", markersize=13, zorder=3)
            axis.set_xlabel(_plain(label))
            axis.grid(alpha=0.25)
        splits = dict.fromkeys(results["inputs"]["split"] for results in files.values())
        axes[0].set_ylabel(_plain(f"mIoU, %, CamVid {', '.join(splits)}"))
        axes[0].set_ylim(bottom=_bottom(files, marked, below))
        handles = _handles(axes[0], files, colours, ink)
        figure.legend(handles=handles, loc="outside lower center", ncols=2 * len(found), fontsize="small",
                      frameon=False)  # fmt: skip
        figure.savefig(target, dpi=150, facecolor=paper)


def _kinds(files: Iterable[Results]) -> list[str]:
    """All kinds of settings, once each, dense first."""
    return list(dict.fromkeys(entry["kind"] for results in files for entry in results["settings"].values()))


def _colours(files: Mapping[str, Results], ink: str) -> dict[str, dict[str, str]]:
    """By file and kind."""
    kinds = _kinds(files.values())
    if len(files) > 1:
        return {file: dict.fromkeys(kinds, _COLOURS[at % len(_COLOURS)]) for at, file in enumerate(files)}
    by_kind = {kind: _COLOURS[at % len(_COLOURS)] for at, kind in enumerate(kind for kind in kinds if kind != "dense")}
    return {file: {**by_kind, "dense": ink} for file in files}


def _draw_points(axis: Any, results: Results, points: Points, colours: Mapping[str, str]) -> None:
    for kind, line in _lines(results, points).items():
        x, y = zip(*line, strict=True)
        axis.plot(x, y, _style(kind), color=colours[kind], markersize=5, linewidth=1.2)
    if "dense" in points:
        axis.axhline(points["dense"][1], color=colours["dense"], linewidth=0.8, alpha=0.6)
        axis.plot(*points["dense"], "*", color=colours["dense"], markersize=11)


def _bottom(files: Mapping[str, Results], marked: tuple[str, str] | None, below: float | None) -> float | None:
    """Where the axis of mIoU ends; None for wherever the points do."""
    miou = [[100 * entry["miou"] for entry in results["settings"].values()] for results in files.values()]
    end = max(100 * results["settings"]["dense"]["miou"] for results in files.values()) - (below or 0.0)
    if below is None or min(map(min, miou)) > end:
        return None
    return end if marked is None else min(end, 100 * files[marked[0]]["settings"][marked[1]]["miou"] - 1)


def _handles(axis: Any, files: Mapping[str, Results], colours: Mapping[str, Mapping[str, str]], ink: str) -> list[Any]:
    """What the legend shows: the files if there are several, and the kinds."""
    several = len(files) > 1
    named = [
        axis.plot([], [], color=colours[file]["dense"], linewidth=3, label=_plain(file)) for file in files if several
    ]
    (first, *_) = colours.values()
    by_kind = [
        axis.plot([], [], _style(kind), color=ink if several else first[kind], markersize=5, label=_plain(kind))
        for kind in _kinds(files.values())
    ]
    return [line for lines in (*named, *by_kind) for line in lines]


def _style(kind: str) -> str:
    return next((style for start, style in _STYLES.items() if kind.startswith(start)), _OTHER_STYLE)


def _plain(label: str) -> str:
    """A label that matplotlib neither reads as a formula nor hides."""
    return label.replace("$", r"\$").lstrip("_")


def _lines(results: Results, points: Points) -> dict[str, list[tuple[float, float]]]:
    """The points of each kind in the order of their x, without the dense one."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, entry in results["settings"].items():
        if entry["kind"] != "dense" and name in points:
            lines.setdefault(entry["kind"], []).append(points[name])
    return {kind: sorted(line) for kind, line in lines.items()}
