"""What a text refers to, and what others can refer to in it: Markdown, notebooks, HTML.

Headings get the anchors that code hosts give them, so that a link which works beside the code works
on the site, too. Both the site's hooks and tests/test_site.py read texts with this.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from markdown_it import MarkdownIt

HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
_REFERRING = {"href": ("a", "link"), "src": ("img", "script", "source", "iframe", "audio", "video")}


class Reference(NamedTuple):
    """An address, and the HTML element that holds it."""

    tag: str
    url: str


class Html(HTMLParser):
    """The references, identifiers and headings of an HTML text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[Reference] = []
        self.ids: set[str] = set()
        self.headings: list[str] = []
        self._in_heading = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keeps what the tag refers to, and its identifier."""
        if tag in HEADINGS:
            self._in_heading = True
            self.headings.append("")
        for name, value in attrs:
            if name == "id" or (tag, name) == ("a", "name"):
                self.ids.add(value or "")
            elif tag in _REFERRING.get(name, ()):
                self.references.append(Reference(tag, value or ""))

    def handle_endtag(self, tag: str) -> None:
        """Ends a heading."""
        if tag in HEADINGS:
            self._in_heading = False

    def handle_data(self, data: str) -> None:
        """Collects the text of a heading."""
        if self._in_heading:
            self.headings[-1] += data


def slugs(headings: Iterable[str]) -> Iterator[str]:
    """Yields the anchor of each heading of a page; one that was there before gets -1, -2, ..."""
    taken: set[str] = set()
    for heading in headings:
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        numbered = (f"{slug}-{number}" for number in itertools.count(1))
        unique = next(name for name in itertools.chain([slug], numbered) if name not in taken)
        taken.add(unique)
        yield unique


def render(path: Path) -> str:
    """A Markdown file, or the text of a notebook, as HTML."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        texts = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        text = "\n\n".join(texts)
    return MarkdownIt("commonmark").enable("table").render(text)


def anchors(page: Html) -> set[str]:
    """What a link into a rendered Markdown file can name after the #."""
    return page.ids | set(slugs(page.headings))


def is_relative(url: str) -> bool:
    """Whether an address is that of another file, or a place in this one."""
    scheme, host, path, _, _ = urlsplit(url)
    return not (scheme or host or path.startswith("/"))
