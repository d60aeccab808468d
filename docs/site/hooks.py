"""Makes the site's pages of what is in the repository, and its links work in both places.

The texts are written to be read beside the code: they link to `../gpt2_jax/block.py` and
`../CONTRIBUTING.md`. Here each file that is linked to becomes a page, and links lead there. A link
to what does not exist stays as it is, and MkDocs warns of it, which ends a strict build.
"""

import posixpath
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit
from xml.etree import ElementTree

import griffe
from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from notebook_pages import fenced, notebook_page
from pages import ROOT, TEXTS, linked_sources, listing, page_of, reference, target, written_texts
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound
from references import HEADINGS, slugs


class RepositoryLinks(Treeprocessor):
    """Turns links to files of the repository into links to their pages, and names headings."""

    page: str = ""
    """source of the page whose links they are"""

    def __init__(self) -> None:
        super().__init__()
        self.texts = {page_of(text): text for text in written_texts()}
        """of each page that people write, its file in the repository"""

    def run(self, root: ElementTree.Element) -> None:
        """Changes the tree of a page, before MkDocs looks at its links."""
        headings = [element for element in root.iter() if element.tag in HEADINGS]
        for heading, slug in zip(headings, slugs(map(_text, headings)), strict=True):
            heading.attrib.setdefault("id", slug)
        for element in root.iter():
            key = {"a": "href", "img": "src"}.get(element.tag)
            if key and self.page in self.texts:
                element.set(key, self._page_url(element.get(key, "")))

    def _page_url(self, url: str) -> str:
        path = target(self.texts[self.page], url)
        if path is None or not (ROOT / path).exists():
            return url
        page = _relative(self.page, page_of(path))
        return urlsplit(url)._replace(path=page).geturl()


class RepositoryExtension(Extension):
    """Brings `RepositoryLinks` into Markdown: one for all pages, which are read one by one."""

    links = RepositoryLinks()

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        """After links are parsed, before headings get their default names and links are checked."""
        md.treeprocessors.register(self.links, "repository_links", 8)


def on_config(config: MkDocsConfig) -> None:
    """Adds the Markdown extension."""
    config.markdown_extensions.append(RepositoryExtension())


@event_priority(100)
def on_files(files: Files, config: MkDocsConfig) -> None:
    """Adds the pages that are made of the repository's files, and lists them in the navigation."""

    def add(page: str, content: str | bytes) -> None:
        files.append(File.generated(config, page, content=content))

    for text in written_texts():
        if text in TEXTS:
            add(page_of(text), (ROOT / text).read_text(encoding="utf-8"))
        elif text.endswith(".ipynb"):
            notebook = notebook_page(ROOT / text)
            add(page_of(text), notebook.markdown)
            add(text, (ROOT / text).read_bytes())
            for name, picture in notebook.pictures.items():
                add(f"notebooks/{name}", picture)
    for path in linked_sources(written_texts()):
        add(page_of(path), _source_page(path))
    for path, page in reference().items():
        module = path.removesuffix(".py").replace("/", ".")
        add(page, f"# {module}\n\n{_link(page, 'Source', page_of(path))}\n\n::: {module}\n")
    add("api/index.md", _reference_index())
    assert config.nav is not None
    config.nav = _with_patterns_filled_in(config.nav, [file.src_uri for file in files])


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> None:  # noqa: ARG001
    """Says whose links come next."""
    RepositoryExtension.links.page = page.file.src_uri


def _text(element: ElementTree.Element) -> str:
    return "".join(element.itertext())


def _link(page: str, text: str, other: str) -> str:
    """A link from one page of the site to another, given their sources."""
    return f"[{text}]({_relative(page, other)})"


def _relative(page: str, other: str) -> str:
    return posixpath.relpath(other, posixpath.dirname(page) or ".")


def _source_page(path: str) -> str:
    """A file with its lines numbered, or the list of a folder's files; not in the search."""
    head = f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n"
    if (ROOT / path).is_dir():
        names = (PurePosixPath(file).name for file in listing(path))
        return head + "\n".join(f"- [{name}]({name}.md)" for name in names) + "\n"
    if path in reference():
        head += _link(page_of(path), "In the API reference", reference()[path]) + "\n\n"
    try:
        language = get_lexer_for_filename(path).aliases[0]
    except ClassNotFound:
        language = "text"
    code = (ROOT / path).read_text(encoding="utf-8")
    return head + fenced(code, language, 'linenums="1" ') + "\n"


def _reference_index() -> str:
    """What `import gpt2_jax` offers: each name with its first line, linked to its module's page."""
    package = griffe.load("gpt2_jax", search_paths=[ROOT])
    assert package.docstring is not None
    assert package.exports is not None
    rows = []
    for name in sorted(map(str, package.exports), key=str.lower):
        member: Any = package[name].final_target
        says = member.docstring.value.partition("\n\n")[0] if member.docstring else ""
        link = f"[`{name}`][{member.path}]"
        rows.append(f"| {link} | `{member.module.path}` | {' '.join(says.split())} |")
    table = ["| name | of | what it is |", "|---|---|---|", *rows]
    return "\n".join(["# gpt2_jax", "", package.docstring.value, "", *table]) + "\n"


def _with_patterns_filled_in(nav: list[Any], pages: list[str]) -> list[Any]:
    """The navigation with the pages that patterns like `api/*.md` stand for.

    A page that the navigation names somewhere itself is left out; a module's is titled by its name.
    """
    named = set(_leaves(nav))

    def fill(items: list[Any]) -> list[Any]:
        filled: list[Any] = []
        for item in items:
            if isinstance(item, dict):
                [(title, value)] = item.items()
                filled.append({title: fill(value) if isinstance(value, list) else value})
            else:
                chosen = [item]
                if "*" in item:
                    matching = [page for page in pages if PurePosixPath(page).match(item)]
                    chosen = sorted(set(matching) - named, key=_place)
                filled += map(_titled, chosen)
        return filled

    return fill(nav)


def _place(page: str) -> tuple[bool, str]:
    """A section's own page comes first."""
    return PurePosixPath(page).stem != "index", page


def _titled(page: str) -> str | dict[str, str]:
    return {PurePosixPath(page).stem: page} if page.startswith("api/") else page


def _leaves(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    values = nav.values() if isinstance(nav, dict) else nav
    return [leaf for value in values for leaf in _leaves(value)]
