"""Shows what `evaluate` measured: a table, the frontier plot, and one page with what each exit got wrong.

    python -m examples.camvid.report --data CAMVID --json results.json --run RUN --setting NAME --out report.html

NAME is a row of the table. The page is a single HTML file. Results of other networks, given as more files after
`--json`, join the frontier.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from examples import shell
from examples.camvid import common, data, frontier, leavers, page
from tokenexit.schedule import Schedule

_SUMMARY = (__doc__ or "").partition("\n")[0]


def table(results: frontier.Results) -> str:
    """One line for each setting that has been evaluated; speeds where they have been timed."""
    rows = frontier.rows(results)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(_aligned(row, widths) for row in rows)


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    return "  ".join([row[0].ljust(widths[0]), *numbers])


def plot(results: frontier.Results, path: Path) -> None:
    """Draw mIoU against work, and against measured images a second for each batch size that was timed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frontier.draw({results["inputs"]["model"]: results}, path, work=frontier.WORK)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.camvid.report", description=_SUMMARY)
    parser.add_argument("--data", type=Path, required=True, help="CamVid folder: train.txt, train/, trainannot/, ...")
    parser.add_argument("--json", type=Path, nargs="+", required=True, help="results of examples.camvid.evaluate")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--run", type=Path, help="run folder that one of the results is of")
    model.add_argument("--init", type=Path, help="ready model that one of the results is of")
    parser.add_argument("--fitted", type=Path, help="exits that examples.frozen has fitted; its own by default")
    parser.add_argument("--setting", required=True, help="which row of those results to look at")
    parser.add_argument("--split", choices=data.SPLITS, help="images to look at; by default those of the results")
    parser.add_argument("--limit", type=int, help="look at only this many images, spread evenly over the split")
    parser.add_argument("--images", type=int, default=6, help="images to show, spread evenly (default %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="batch size (default %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True, help="the page, .html")
    given = parser.parse_args()
    shell.require_counts(images=given.images, batch=given.batch, threads=given.threads)
    return given


def read_results(path: Path) -> frontier.Results:
    """What `evaluate` wrote.

    Raises:
        UsageError: If it did not, or has not got as far as the dense network.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        complete = "dense" in results["settings"] and {"inputs", "timing", "about"} <= results.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise shell.UsageError(f"`--json` must be results of examples.camvid.evaluate, got {str(path)!r}") from error
    if not complete:
        raise shell.UsageError(f"`--json` must have the dense network's results, got {str(path)!r} without")
    return results


def labelled(paths: Sequence[Path]) -> dict[str, Path]:
    """Files by their name without its ending; by their whole path where names are not distinct."""
    stems = [path.stem for path in paths]
    return {path.stem if stems.count(path.stem) == 1 else str(path): path for path in paths}


def read_all(paths: Mapping[str, Path]) -> dict[str, frontier.Results]:
    """Results by their labels.

    Raises:
        UsageError: As for `read_results`, or if they are not of the same images: they would not share an axis.
    """
    files = {label: read_results(path) for label, path in paths.items()}
    images = {label: f"{one['inputs']['images']} of {one['inputs']['split']}" for label, one in files.items()}
    if len(set(images.values())) > 1:
        found = ", ".join(f"{label} with {which}" for label, which in images.items())
        raise shell.UsageError(f"`--json` must all be of the same images, got {found}")
    return files


def of_network(files: Mapping[str, frontier.Results], source: Path, setting: str) -> str:
    """The label of the first results that are of this network and have this setting.

    Raises:
        UsageError: If there are none.
    """
    if not source.exists():
        raise shell.UsageError(f"`--run` or `--init` must exist, got {str(source)!r}")
    sha256 = common.digest(source)
    own = {label: results for label, results in files.items() if results["inputs"]["sha256"] == sha256}
    if not own:
        raise shell.UsageError(
            f"`--json` must have results of {str(source)!r}, {sha256}, got "
            + ", ".join(f"{label} of {results['inputs']['sha256']}" for label, results in files.items())
        )
    found = next((label for label, results in own.items() if setting in results["settings"]), None)
    if found is None:
        known = [name for results in own.values() for name in results["settings"]]
        raise shell.UsageError(f"`--setting` must be one of {known}, got {setting!r}")
    return found


def content_of(given: argparse.Namespace) -> page.Content:
    """Run the network, and gather what the page shows.

    Raises:
        UsageError: If data, model or results do not fit the arguments.
    """
    paths = labelled(given.json)
    files = read_all(paths)
    source = given.run or given.init
    label = of_network(files, source, given.setting)
    inputs, how = files[label]["inputs"], files[label]["settings"][given.setting]["schedule"]
    if "baseline" in how:
        raise shell.UsageError(f"`--setting` must be a schedule and no baseline, got {given.setting!r}")
    split = given.split or inputs["split"]
    frames = data.frames(given.data, split, given.limit)
    if inputs.get("fitted") != common.digest_of_exits(given.fitted):
        raise shell.UsageError(f"`--fitted` must be the exits that the results are of, got {given.fitted}")
    fitted = given.fitted if inputs["fit_after"] is None else common.fitted_exits(paths[label])
    model = common.saved_model(source, data.SIZE, fitted=fitted).eval().to(given.device)
    plan = Schedule.from_dict(how)
    shown = np.linspace(0, len(frames) - 1, min(given.images, len(frames)), dtype=int).tolist()
    batches = data.Batches(frames, given.batch)
    tokens, pictures = leavers.look(model, plan, batches, shown, torch.device(given.device))
    return page.Content(
        files=files, file=label, setting=given.setting, split=split, blocks=model.depth,
        tallies=leavers.tally(tokens, (*plan.after, model.depth)), tokens=tokens, pictures=pictures,
    )  # fmt: skip


def main() -> None:
    """Run from the command line."""
    given = arguments()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    text = page.render(content_of(given))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with shell.replacing(given.out) as file:
        file.write(text.encode())
    print(f"page written to {given.out}")


if __name__ == "__main__":
    shell.exit_with(main)
