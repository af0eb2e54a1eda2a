"""Assessments that no model was run for, and a reader of pages."""

from dataclasses import dataclass, field, replace
from html.parser import HTMLParser

from tokenexit import schedule
from tokenexit.assessment import Assessment, Measured

VOID = {"meta", "link", "img", "br"}


def assessment(
    *, timed: bool = True, labels: bool = False, name: str = "merging 0.95", **changed: object
) -> Assessment:
    """One contender of each kind; the second is chosen if they were timed."""
    merged = schedule.merged(alike={1: 0.95})
    rows = (
        Measured("dense", "dense", 0.0, 1.0, None, 0.73, (0.99, 1.0, 1.01), 212.4),
        Measured(name, "merging", 0.008, 0.6, merged, 0.726, (1.48, 1.5, 1.53), 141.6),
        Measured("bolder merging", "merging", 0.03, 0.4, merged, 0.71, (1.8, 1.9, 2.0), 111.8),
        Measured("exits", "exits", 0.004, 0.8, schedule.neighbours(threshold=0.99), 0.728, (1.1, 1.2, 1.21), 177.0),
        Measured("both", "merging and exits", 0.02, 0.5, merged, 0.72, (1.5, 1.7, 1.8), 125.0),
        Measured(
            "the first 8 blocks", "truncation", 0.13, 0.68, schedule.truncated(after=8), 0.6, (1.4, 1.45, 1.5), 146.5
        ),
        Measured("384 x 384 pixels", "smaller input", 0.04, 0.5, None, 0.7, (1.8, 1.9, 2.0), 111.8),
        Measured("compiled", "compiled dense", 0.0, None, None, 0.73, (1.05, 1.1, 1.15), 193.0),
    )
    if not labels:
        rows = tuple(replace(row, quality=None) for row in rows)
    if not timed:
        rows = tuple(replace(row, speedup=None, milliseconds=None) for row in rows)
    found = Assessment(
        rows, "pixels that get another class", 0.01, images=64, fitted=200, batch=8, size=(512, 512), grid=(32, 32),
        blocks=12, machine="a CPU, 2 threads", notes=("Exit heads were fitted to no label.",),
    )  # fmt: skip
    return replace(found, **changed)


@dataclass
class Element:
    """A tag, and what is in it."""

    tag: str
    attributes: dict[str, str | None]
    inside: list["Element | str"] = field(default_factory=list)

    def all(self, tag: str) -> list["Element"]:
        """Every element of a tag, at whatever depth."""
        children = [one for one in self.inside if isinstance(one, Element)]
        return [found for one in children for found in ([one] if one.tag == tag else []) + one.all(tag)]

    @property
    def everything(self) -> list["Element"]:
        """Every element, at whatever depth."""
        children = [one for one in self.inside if isinstance(one, Element)]
        return [found for one in children for found in [one, *one.everything]]

    @property
    def text(self) -> str:
        """All text, with single blanks."""
        return " ".join("".join(one if isinstance(one, str) else one.text for one in self.inside).split())


class Page(HTMLParser):
    """A page as a tree; an assertion fails where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]
        self.feed(text)
        self.close()
        assert self.open == [self.root], [one.tag for one in self.open]

    def handle_starttag(self, tag, attrs):
        one = Element(tag, dict(attrs))
        assert len(one.attributes) == len(attrs), attrs
        self.open[-1].inside.append(one)
        if tag not in VOID:
            self.open.append(one)

    def handle_startendtag(self, tag, attrs):
        self.open[-1].inside.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open[-1].tag == tag, (self.open[-1].tag, tag)
        self.open.pop()

    def handle_data(self, data):
        self.open[-1].inside.append(data)
