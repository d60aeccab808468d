"""Every link of the texts leads somewhere, beside the code and on the site that is made of them."""

import functools
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from notebook_pages import fenced, notebook_page
from pages import ROOT, page_of, target, written_texts
from references import Html, anchors, render, slugs

each_text = pytest.mark.parametrize("text", written_texts())

COUNTED = ("h1", "h2", "h3", "li", "table", "tr", "td", "pre", "img", "strong", "em", "blockquote")
"""elements that two kinds of Markdown might see differently"""


@functools.cache
def read(path: Path) -> Html:
    """An HTML file, or what Markdown or a notebook is as HTML."""
    return Html(path.read_text(encoding="utf-8") if path.suffix == ".html" else render(path))


def missing(path: Path, url: str, root: Path) -> str | None:
    """What a relative address does not find, from a text or a page below `root`."""
    scheme, host, place, _, anchor = urlsplit(url)
    if scheme or host:
        return None
    base = root if place.startswith("/") else path.parent
    target = base / unquote(place).lstrip("/") if place else path
    if not target.resolve().is_relative_to(root.resolve()):
        return f"{url} leads out"
    if not target.exists():
        return f"there is no {url}"
    if anchor and target.suffix not in (".md", ".ipynb", ".html"):
        return f"{url} names a place in what has no headings"
    if anchor:
        there = read(target)
        names = there.ids if target.suffix == ".html" else anchors(there)
        if unquote(anchor) not in names:
            return f"{url} has no such heading"
    return None


def broken_links(path: Path, root: Path) -> list[str]:
    """Links and pictures of a text or page that lead nowhere."""
    urls = dict.fromkeys(reference.url for reference in read(path).references)
    return [problem for url in urls if (problem := missing(path, url, root))]


def asked_of_others(page: Path) -> list[str]:
    """What a page, or a style sheet, loads from other hosts."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"(?:@import|url\()\s*[\"']?((?:https?:)?//[^\"')]+)", text)
    if page.suffix == ".html":
        references = (reference for reference in read(page).references if reference.tag != "a")
        found += [url for _, url in references if urlsplit(url).netloc]
    return found


@each_text
def test_every_link_of_a_text_leads_somewhere(text: str):
    assert broken_links(ROOT / text, ROOT) == []


@pytest.mark.parametrize(
    ("link", "problem"),
    [
        ("[a](other.md)", None),
        ("[a](other.md#two-words)", None),
        ("[a](other.md#two-words-1)", None),
        ("[a](#here)", None),
        ("[a](folder)", None),
        ("[a](https://example.org/gone.md)", None),
        ("`[a](gone.md)`", None),
        ("[a](gone.md)", "there is no gone.md"),
        ("![a](gone.png)", "there is no gone.png"),
        ('<img src="gone.png">', "there is no gone.png"),
        ("[a][b]\n\n[b]: gone.md", "there is no gone.md"),
        ("[a](other.md#two-words-2)", "other.md#two-words-2 has no such heading"),
        ("[a](#there)", "#there has no such heading"),
        ("[a](other.py#L3)", "other.py#L3 names a place in what has no headings"),
        ("[a](../elsewhere.md)", "../elsewhere.md leads out"),
    ],
)
def test_a_broken_link_is_found(tmp_path: Path, link: str, problem: str | None):
    (tmp_path / "folder").mkdir()
    (tmp_path / "other.py").write_text("")
    (tmp_path / "other.md").write_text("# Two words\n\n## Two `words`\n")
    text = tmp_path / "text.md"
    text.write_text(f"# Here\n\n{link}\n")
    assert broken_links(text, tmp_path) == ([problem] if problem else [])


def test_headings_get_the_names_that_code_hosts_give_them():
    headings = ["The data's way", "`state_dict` is a tree", "A, B & C", "Added", "Added", "Added-1"]
    assert list(slugs(headings)) == [
        "the-datas-way",
        "state_dict-is-a-tree",
        "a-b--c",
        "added",
        "added-1",
        "added-1-1",
    ]


def test_links_go_to_the_page_of_a_file():
    assert target("docs/train.md", "../README.md#train") == "README.md"
    assert target("docs/train.md", "https://example.org") is None
    assert target("docs/train.md", "#data") is None
    assert page_of("docs/train.md") == "train.md"
    assert page_of("CHANGELOG.md") == "changelog.md"
    assert page_of("docs/site/hooks.py") == "source/docs/site/hooks.py.md"
    assert page_of("gpt2_jax/block.py") == "source/gpt2_jax/block.py.md"
    assert page_of("gpt2_jax/evaluation") == "source/gpt2_jax/evaluation/index.md"
    assert page_of(".github/workflows/ci.yml") == "source/github/workflows/ci.yml.md"


def test_a_notebook_becomes_a_page_with_what_its_cells_showed(tmp_path: Path):
    notebook = tmp_path / "a.ipynb"
    notebook.write_text(
        """{"cells": [
        {"cell_type": "markdown", "source": ["# Title\\n", "text"]},
        {"cell_type": "code", "source": "x = 1", "outputs": [
            {"output_type": "stream", "text": ["\\u001b[31mred\\u001b[0m\\n"]},
            {"output_type": "display_data", "data": {"image/png": "UE5H", "text/plain": "p"}},
            {"output_type": "display_data", "data": {"text/html": "<b>two</b>"}},
            {"output_type": "execute_result", "data": {"text/plain": ["1"]}}]}
        ]}"""
    )
    markdown, pictures = notebook_page(notebook)
    assert pictures == {"a_2_2.png": b"PNG"}
    assert markdown.startswith('# Title\ntext\n\n<a href="a.ipynb" download>')
    places = [markdown.index(part) for part in ("x = 1", "red", "a_2_2.png", "<b>two</b>", "\n1\n")]
    assert places == sorted(places)
    assert "\x1b" not in markdown


def test_code_that_holds_fences_is_fenced_by_longer_ones():
    assert fenced("a", "text").startswith("``` ")
    assert fenced("```sh\n```", "markdown").endswith("\n````")


def build(folder: Path, site: Path) -> subprocess.CompletedProcess:
    """Builds the site of what is in a folder."""
    for name in ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers"):
        pytest.importorskip(name, reason=f"needs {name} (requirements.txt)")
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", site],
        cwd=folder,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("site")
    built = build(ROOT, site)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return site


@pytest.mark.slow
def test_every_link_of_the_site_leads_somewhere(site: Path):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 100
    broken = {page.relative_to(site): broken_links(page, site) for page in pages}
    assert {page: links for page, links in broken.items() if links} == {}


@pytest.mark.slow
def test_the_site_asks_nothing_of_other_hosts(site: Path):
    files = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert {file: found for file in files if (found := asked_of_others(file))} == {}
    # For these the theme's script would load a library.
    assert not [page for page in site.rglob("*.html") if 'class="mermaid"' in page.read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("text", [text for text in written_texts() if text.endswith(".md")])
def test_a_text_has_the_same_parts_on_the_site(text: str, site: Path):
    page = (site / page_of(text)).with_suffix(".html").read_text(encoding="utf-8")
    article = re.search(r"<article.*</article>", page, re.DOTALL)
    assert article is not None
    assert elements(article[0]) == elements(render(ROOT / text))


@pytest.mark.slow
def test_no_docstring_shows_its_markup(site: Path):
    for page in (site / "api").rglob("*.html"):
        text = re.sub(r"<(pre|code)\b.*?</\1>", "", page.read_text(encoding="utf-8"), flags=re.S)
        left = re.findall(r"<p>(?:Args|Returns|Raises|Yields):|``|&gt;&gt;&gt;", text)
        assert not left, page


@pytest.mark.slow
def test_a_broken_link_ends_the_build(tmp_path: Path):
    folder = tmp_path / "repository"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "data", "runs", "site", "*.ipynb")
    for name in ("docs", "gpt2_jax", "parity", "launch", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored if name != "docs" else None)
    (folder / "notebooks").mkdir()
    for name in ("mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"):
        shutil.copy(ROOT / name, folder)
    with (folder / "docs" / "export.md").open("a") as text:
        text.write("\n[one](../gpt2_jax/gone.py) [two](train.md#gone)\n")
    built = build(folder, tmp_path / "site")
    assert built.returncode != 0
    assert "'../gpt2_jax/gone.py', but the target" in built.stderr
    assert "'train.md#gone', but the doc 'train.md' does not contain an anchor" in built.stderr


@pytest.mark.parametrize(
    ("page", "problems", "asked"),
    [
        ('<a href="other.html#there">', [], []),
        ('<a href="https://example.org">', [], []),
        ('<a href="/other.html">', [], []),
        ('<a href="other.html#gone">', ["other.html#gone has no such heading"], []),
        ('<script src="gone.js"></script>', ["there is no gone.js"], []),
        (
            '<script src="https://cdn.example.org/a.js"></script>',
            [],
            ["https://cdn.example.org/a.js"],
        ),
        ('<link rel="icon" href="//example.org/i.png">', [], ["//example.org/i.png"]),
        ("<style>a { background: url(https://a.org/b.png) }</style>", [], ["https://a.org/b.png"]),
    ],
)
def test_what_a_page_lacks_is_found(tmp_path: Path, page: str, problems: list, asked: list):
    (tmp_path / "other.html").write_text('<p id="there">')
    file = tmp_path / "page.html"
    file.write_text(page)
    assert broken_links(file, tmp_path) == problems
    assert asked_of_others(file) == asked


class _Elements(HTMLParser):
    """Counts elements."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def handle_starttag(self, tag: str, attrs: list) -> None:  # noqa: ARG002
        if tag in COUNTED:
            self.count[tag] += 1


def elements(html: str) -> Counter[str]:
    """How many of each of `COUNTED` there are."""
    parser = _Elements()
    parser.feed(html)
    return parser.count
