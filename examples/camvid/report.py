"""Shows what `evaluate` measured: a table and the frontier plot, both from the results as they lie in the JSON file."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_STYLES = {
    "truncated": "s--",
    "DToP, k = 0": "v-",
    "DToP, k = 5": "^-",
    "neighbours": "o-",
    "PAUMER": "s-",
    "DoViT": "d-",
}  # by how the kind begins


def table(results: Mapping[str, Any]) -> str:
    """One line for each setting that has been evaluated; speeds where they have been timed."""
    batches = list(results["timing"])
    dense = results["settings"]["dense"]["miou"]
    sequences = list(results["settings"]["dense"]["miou_by_sequence"])
    parts = sequences if len(sequences) > 1 else []
    header = ["setting", "mIoU", "vs dense", *parts, "token-blocks", "GMACs", "agreement"]
    header += [f"images/s, batch {batch} (x dense)" for batch in batches]
    rows = [header]
    for name, entry in results["settings"].items():
        row = [
            name, f"{100 * entry['miou']:.2f}", f"{100 * (entry['miou'] - dense):+.2f}",
            *(f"{100 * entry['miou_by_sequence'][part]:.2f}" for part in parts),
            f"{entry['token_blocks']:.3f}", f"{entry['multiply_adds'] / 1e9:.2f}", f"{100 * entry['agreement']:.2f} %",
        ]  # fmt: skip
        rows.append(row + [_speed(results["timing"][batch]["settings"].get(name)) for batch in batches])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(_aligned(row, widths) for row in rows)


def _speed(entry: Mapping[str, list[float]] | None) -> str:
    if entry is None:
        return "-"
    (low, middle, high), ratio = entry["images_per_second"], entry["speedup"][1]
    return f"{middle:.2f} [{low:.2f}, {high:.2f}] x{ratio:.2f}"


def _aligned(row: list[str], widths: list[int]) -> str:
    numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    return "  ".join([row[0].ljust(widths[0]), *numbers])


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Draw mIoU against token-blocks, and against measured images a second for each batch size that was timed."""
    from matplotlib.figure import Figure  # an extra, needed for this alone

    axes_of_x = ["token-blocks (dense = 1)", *(f"images / s, batch {batch}" for batch in results["timing"])]
    figure = Figure(figsize=(5.5 * len(axes_of_x), 4.5), layout="constrained")
    axes = figure.subplots(1, len(axes_of_x), sharey=True, squeeze=False)[0]
    for axis, label, points in zip(axes, axes_of_x, _panels(results), strict=True):
        for kind, line in _lines(results, points).items():
            style = next(style for start, style in _STYLES.items() if kind.startswith(start))
            axis.plot([x for x, _ in line], [y for _, y in line], style, label=kind, markersize=5)
        speed, miou = points["dense"]
        axis.axhline(miou, color="black", linewidth=1, label="dense")
        axis.plot([speed], [miou], "k*", markersize=10)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"mIoU, %, CamVid {results['inputs']['split']}")
    axes[0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _lines(
    results: Mapping[str, Any], points: Mapping[str, tuple[float, float]]
) -> dict[str, list[tuple[float, float]]]:
    """The points of each kind in the order of their x, without the dense one; a kind may have none in some panel."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, entry in results["settings"].items():
        if entry["kind"] != "dense":
            lines.setdefault(entry["kind"], []).extend([points[name]] if name in points else [])
    return {kind: sorted(line) for kind, line in lines.items()}


def _panels(results: Mapping[str, Any]) -> Iterator[dict[str, tuple[float, float]]]:
    """For each panel, (x, mIoU in %) of each setting that has both."""
    miou = {name: 100 * entry["miou"] for name, entry in results["settings"].items()}
    yield {name: (entry["token_blocks"], miou[name]) for name, entry in results["settings"].items()}
    for timed in results["timing"].values():
        yield {
            name: (entry["images_per_second"][1], miou[name])
            for name, entry in timed["settings"].items()
            if name in miou
        }
