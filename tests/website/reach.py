"""Whether users find what they ask for: clicks and searches on the built site, for twenty questions.

Called as `python -m tests.website.reach site` after `mkdocs build`. A click is a link that is seen: in the text of a page,
in the tabs, or in the part of the navigation that is open; what is folded away is no link in the page
(`navigation.prune`). A search is that of the site: its own index, read by lunr. It fails if a question needs more than
two clicks and is not among the first three results of its search either, if more than twelve pages of the navigation are
open anywhere, or if a search of `TERMS` finds another page. `--table FILE` compares the table with the one in a page.
"""

import argparse
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urldefrag, urljoin

from lunr import lunr
from lunr.index import Index

QUESTIONS = Path(__file__).parent / "questions.toml"
TERMS = {
    "early exit": "concepts/exits/",
    "token pruning": "methods/",
    "token merging ONNX": "howto/deploy/",
    "DINOv2 faster": "howto/model/",
    "TensorRT": "howto/deploy/",
}
"""What people type, and the page where they should land: among the first three."""

_TABLE = "results/testing/"  # has the questions, and answers none
_CLICKS, _RESULTS, _OPEN = 2, 3, 12
_SILENT = {"script", "style", "svg"}


class _Page(HTMLParser):
    """Text of an article, the links that are seen, and how many pages of the navigation are open."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.links: list[str] = []
        self.open = 0
        self._within: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        kind = known.get("class") or ""
        if tag not in ("input", "img", "br", "meta", "link", "hr", "source", "path", "wbr"):
            self._within.append((tag, kind))
        target = known.get("href")
        if tag != "a" or target is None:
            return
        listed = self._is_in("md-nav--primary") and not self._is_in("md-nav--secondary")
        if self._is_in("article") or self._is_in("md-tabs") or listed:
            self.links.append(target)
        section = any("md-nav__item--nested" in kind for _, kind in self._within[-2:])
        if listed and "md-nav__link" in kind and not section:
            self.open += 1

    def handle_endtag(self, tag: str) -> None:
        if any(name == tag for name, _ in self._within):
            while self._within.pop()[0] != tag:
                pass

    def handle_data(self, data: str) -> None:
        if self._is_in("article") and not any(name in _SILENT for name, _ in self._within):
            self.text.append(data)

    def _is_in(self, kind: str) -> bool:
        return any(name == kind or kind in kinds.split() for name, kinds in self._within)


@dataclass(frozen=True)
class Page:
    """A page of the built site.

    Attributes:
        text: Its text, white space as single spaces.
        links: Pages that it links to, by their address in the site.
        open: Pages of the navigation that are open beside it.
    """

    text: str
    links: frozenset[str]
    open: int


def pages(site: Path, /) -> dict[str, Page]:
    """The pages of a built site, by address: "" is the start page."""
    found = {}
    for file in site.rglob("index.html"):
        address = file.parent.relative_to(site).as_posix().removeprefix(".")
        address = f"{address}/" if address else ""
        parser = _Page()
        parser.feed(file.read_text(encoding="utf-8"))
        own = f"https://site/{address}"
        targets = (urldefrag(urljoin(own, link)).url for link in parser.links)
        inside = frozenset(one.removeprefix("https://site/") for one in targets if one.startswith("https://site/"))
        found[address] = Page(" ".join("".join(parser.text).split()), inside, parser.open)
    return found


def clicks(site: dict[str, Page], /) -> dict[str, int]:
    """Clicks from the start page to each page that can be reached."""
    reached, edge = {"": 0}, [""]
    while edge:
        step = {link for address in edge for link in site[address].links if link in site} - reached.keys()
        reached |= dict.fromkeys(step, reached[edge[0]] + 1)
        edge = sorted(step)
    return reached


def index(site: Path, /) -> Index:
    """The search index of a built site, as its browser's one: titles weigh most."""
    documents = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))["docs"]
    fields = [{"field_name": "title", "boost": 1000}, {"field_name": "text", "boost": 1}]
    return lunr(ref="location", fields=fields, documents=documents)


def searched(words: str, searching: Index, /) -> Iterator[str]:
    """Pages that a search finds, the best first, each once."""
    plain = " ".join(re.findall(r"\w+", words))
    yield from dict.fromkeys(urldefrag(one["ref"]).url for one in searching.search(plain))


def table(site: Path, /) -> tuple[str, list[str]]:
    """The questions as a table in Markdown, and complaints."""
    known, searching, lines, complaints = pages(site), index(site), [], []
    reached = clicks(known)
    for asked in tomllib.loads(QUESTIONS.read_text())["question"]:
        words = [word.lower() for word in asked["words"]]
        answers = {
            address
            for address, page in known.items()
            if address != _TABLE and all(word in page.text.lower() for word in words)
        }
        near = min((reached[one] for one in answers if one in reached), default=None)
        order = list(searched(asked["search"], searching))[:10]
        place = min((order.index(one) + 1 for one in answers if one in order), default=None)
        told = min(answers, key=lambda one: (reached.get(one, 99), one), default="-")
        lines.append(f"| {asked['asks']} | {near} | {asked['search']} | {place or '-'} | `{told or 'index'}` |")
        if (near is None or near > _CLICKS) and (place is None or place > _RESULTS):
            complaints.append(f"{asked['asks']}: {near} clicks, place {place} of {order[:3]}")
    for words, page in TERMS.items():
        first = list(searched(words, searching))[:_RESULTS]
        if page not in first:
            complaints.append(f"a search for {words!r} finds {first}, not {page}")
    wide = {address: page.open for address, page in known.items() if page.open > _OPEN}
    complaints += [f"{count} pages of the navigation are open at {address}" for address, count in wide.items()]
    head = ["| question | clicks | a search for | finds it at place | page |", "|---|---:|---|---:|---|"]
    return "\n".join([*head, *lines]), complaints


def main() -> int:
    """Print the table, and what is wrong."""
    parser = argparse.ArgumentParser(description="Whether users find what they ask for")
    parser.add_argument("site", type=Path, help="the built site")
    parser.add_argument("--table", type=Path, metavar="FILE", help="page that must have this table")
    given = parser.parse_args()
    found, complaints = table(given.site)
    sys.stdout.write(f"{found}\n")
    if given.table is not None and found not in given.table.read_text():
        complaints.append(f"{given.table} has another table")
    sys.stdout.writelines(f"WRONG: {one}\n" for one in complaints)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
