"""Page of an assessment: the verdict, the plot, the table and the plan in one file of HTML that asks for no other."""

import base64
import io
import json
import os
import warnings
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tokenexit import folders
from tokenexit.assessment import plot
from tokenexit.assessment._template import PAGE
from tokenexit.assessment.results import OURS, Assessment, Kind, Measured
from tokenexit.errors import TokenExitError, require
from tokenexit.schedule import Schedule

__all__ = ["write"]

_TITLE = "Can this model be faster? An assessment by tokenexit"
_SALT = "tokenexit"  # of ids in the plot, which would be drawn anew at every call
_DOTS_PER_INCH = 110
_USE = """\
import json
from pathlib import Path
from tokenexit.schedule import Schedule

plan = Schedule.from_dict(json.loads(Path("plan.json").read_text()))
model.retune(plan)  # in JAX: model = model.retuned(plan)"""


def write(assessment: Assessment, file: str | Path, /, *, figures: Sequence[tuple[str, Any]] = ()) -> None:
    """Write a page: verdict, conditions, plot, table, the chosen plan, figures and notes.

    It is one file without scripts, which asks for nothing else; for phones and wide screens, light or dark. The same
    assessment gives the same bytes.

    Args:
        assessment: The assessment.
        file: Where to write it, whole or not at all.
        figures: Captions and a `matplotlib.figure.Figure` each, as `pictures.draw` returns it.

    Raises:
        TokenExitError: If matplotlib is not installed, an argument is of another type, nothing was timed or counted,
            the chosen plan has a policy that is not of this library, or the file cannot be written.
    """
    require(isinstance(assessment, Assessment), "assessment", "be an Assessment", type(assessment).__name__)
    require(isinstance(file, str | os.PathLike), "file", "be a path", type(file).__name__)
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TokenExitError(f"`page` must have matplotlib, `pip install tokenexit[viz]`, got {error}") from error
    rule = "be pairs of a caption and a matplotlib.figure.Figure"
    require(isinstance(figures, Sequence), "figures", rule, type(figures).__name__)
    for one in figures:
        pair = isinstance(one, tuple) and len(one) == 2 and isinstance(one[0], str) and isinstance(one[1], Figure)
        require(pair, "figures", rule, repr(one))
    answer, _, said = assessment.verdict().partition(": ")
    first, dot, rest = said.partition(". ")
    with mpl.rc_context():
        mpl.rcdefaults()  # a style of the user's would change the page
        mpl.rcParams.update({"svg.hashsalt": _SALT, "svg.fonttype": "none"})
        text = PAGE.substitute(
            title=escape(_TITLE),
            answer=escape(answer),
            answer_class="yes" if assessment.worth else "no",
            verdict=escape(_capitalised(first + dot.strip())),
            beside=f"<p>{escape(rest)}</p>\n" if rest else "",
            figures_of_chosen=_figures_of(assessment.chosen, assessment.loss),
            conditions=escape(_capitalised(assessment.conditions)),
            plot=_svg(plot.draw(assessment), _described(assessment)),
            reading=escape(_reading(assessment)),
            table=_table(assessment),
            plan=_plan(assessment.plan),
            maps=_maps(figures),
            notes=_notes(assessment.notes),
        )
    folders.write(Path(file), text.encode("utf-8", "replace"), argument="file")


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _figures_of(chosen: Measured | None, loss: str) -> str:
    """The few numbers of what was chosen that are remembered."""
    if chosen is None:
        return ""
    found = [(f"{chosen.times:.2f} \u00d7", "as fast as dense"), (f"{100 * chosen.loss:.3g} %", loss)]
    if chosen.cost is not None:
        found.append((f"{100 * (1 - chosen.cost):.0f} %", "of the multiply-adds saved"))
    inside = "".join(f"<div><dt>{escape(words)}</dt><dd>{escape(number)}</dd></div>\n" for number, words in found)
    return f"<dl>\n{inside}</dl>\n"


def _described(assessment: Assessment) -> str:
    """The plot for those who do not see it."""
    chosen, ring = assessment.chosen, "None was chosen."
    if chosen is not None:
        changed = f"{100 * chosen.loss:.3g} % of {assessment.loss}"
        ring = f"Chosen: {chosen.name}, {chosen.times:.2f} times as fast as dense at {changed}."
    return f"{len(assessment.rows)} contenders. {ring} The table has all numbers."


def _reading(assessment: Assessment) -> str:
    """How to read the plot."""
    timed = any(row.speedup is not None for row in assessment.rows)
    parts = [
        f"Further to the right {'is faster' if timed else 'saves more'}, further down changes less.",
        f"The shaded band is what changes at most {100 * assessment.at_most:.3g} %; above it the scale is logarithmic.",
        *(["Bars are quartiles."] if timed else []),
        "Filled markers are dense and this library, hollow ones what it is compared with.",
    ]
    if timed and any(row.quality is not None for row in assessment.rows):
        parts.append("Where a line of mIoU runs out below, it falls much further: the table says how far.")
    return " ".join(parts)


def _svg(figure: Any, description: str) -> str:
    """A figure as a part of the page: it scales with the width, and says in words what it shows."""
    drawn = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # matplotlib's font lacks it: the browser's draws the text
        figure.savefig(drawn, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    inside = drawn.getvalue().partition("<svg")[2].partition(">")[2]
    width, height = 72 * figure.get_size_inches()
    name = "What contenders change, by how much faster they are and how much they save"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'viewBox="0 0 {width:g} {height:g}" aria-label="{escape(f"{name}: {description}")}">\n'
        f"<title>{escape(name)}</title>\n<desc>{escape(description)}</desc>{inside.rstrip()}"
    )


def _table(assessment: Assessment) -> str:
    """All rows; columns of which no row has a number are left out."""
    columns: dict[str, Callable[[Measured], str]] = {
        f"{assessment.loss}, %": lambda row: f"{100 * row.loss:.2f}",
        "times as fast as dense [quartiles]": _times,
        "ms an image": lambda row: "" if row.milliseconds is None else f"{row.milliseconds:.1f}",
        "multiply-adds, dense = 1": lambda row: "" if row.cost is None else f"{row.cost:.3f}",
        "mIoU, %": lambda row: "" if row.quality is None else f"{100 * row.quality:.2f}",
        "kind": lambda row: escape(row.kind),
    }
    shown = {name: cell for name, cell in columns.items() if any(map(cell, assessment.rows))}
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("contender", *shown))
    chosen, lines = assessment.chosen, []
    for row in assessment.ordered:
        start, tag = "<tr>", ""
        if row is chosen:
            start, tag = '<tr class="chosen">', ' <span class="tag">chosen</span>'
        name = f'<th scope="row">{_dot(row.kind)}{escape(row.name)}{tag}</th>'
        lines.append(f"{start}{name}{''.join(f'<td>{cell(row)}</td>' for cell in shown.values())}</tr>\n")
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(lines)}</tbody>\n</table>"


def _dot(kind: Kind) -> str:
    """The colour of a kind in the plot, hollow where its markers are; what is black there is the colour of text."""
    colour = "currentColor" if kind in ("dense", "compiled dense") else plot.STYLES[kind][0]
    ours = " ours" if kind in (*OURS, "dense") else ""
    return f'<span class="dot{ours}" style="--dot: {colour}"></span>'


def _times(row: Measured) -> str:
    if row.speedup is None:
        return ""
    low, middle, high = row.speedup
    return f"{middle:.2f} <small>[{low:.2f}, {high:.2f}]</small>"


def _plan(plan: Schedule | None) -> str:
    if plan is None:
        return ""
    text = json.dumps(plan.to_dict(), indent=2, ensure_ascii=False)
    return (
        "<section>\n<h2>Use the chosen plan</h2>\n"
        "<p>Save the plan below as <code>plan.json</code>, and give it to the model that was assessed:</p>\n"
        f'<div class="box"><pre tabindex="0"><code>{escape(_USE)}</code></pre></div>\n'
        f'<details class="box"><summary>The plan as JSON</summary>\n'
        f'<pre tabindex="0"><code>{escape(text)}</code></pre></details>\n</section>\n'
    )


def _maps(figures: Sequence[tuple[str, Any]]) -> str:
    if not figures:
        return ""
    inside = "".join(_map(caption, figure) for caption, figure in figures)
    return f'<section>\n<h2>Where patches leave and merge</h2>\n<div class="maps">\n{inside}</div>\n</section>\n'


def _map(caption: str, figure: Any) -> str:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DOTS_PER_INCH, bbox_inches="tight", metadata={"Software": None})
    source = f"data:image/png;base64,{base64.b64encode(drawn.getvalue()).decode()}"
    shown = [axis.get_title() for axis in figure.axes if axis.get_title()]
    described = escape(": ".join([caption, *([", ".join(shown)] if shown else [])]))
    return (
        f'<figure><div class="box" role="region" aria-label="{escape(caption)}" tabindex="0">'
        f'<img src="{source}" alt="{described}"></div>\n<figcaption>{escape(caption)}</figcaption></figure>\n'
    )


def _notes(notes: Sequence[str]) -> str:
    inside = "".join(f"<li>{escape(note)}</li>\n" for note in notes)
    return f"<section>\n<h2>What else to know</h2>\n<ul>\n{inside}</ul>\n</section>\n" if notes else ""
