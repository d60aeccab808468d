"""Which page of the site shows which file of the repository."""

import re
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from references import Html, is_relative, render

ROOT = Path(__file__).resolve().parents[2]

# Texts outside docs/ that are pages of their own.
TEXTS = {
    "README.md": "overview.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "launch/README.md": "launch.md",
    "notebooks/README.md": "notebooks/index.md",
}
# Modules that serve the scripts alone have no page in the reference.
NOT_IN_REFERENCE = ("gpt2_jax/benchmarks/", "gpt2_jax/cli.py")


def page_of(path: str) -> str:
    """The source of the page, relative to docs/, that shows a file or folder.

    Args:
      path: relative to the repository.
    """
    if path in TEXTS:
        return TEXTS[path]
    if path.startswith("docs/") and not path.startswith("docs/site/"):
        return path.removeprefix("docs/")
    if path.startswith("notebooks/") and path.endswith(".ipynb"):
        return str(PurePosixPath(path).with_suffix(".md"))
    # MkDocs leaves out what begins with a dot.
    visible = re.sub(r"(^|/)\.", r"\1", path)
    return f"source/{visible}/index.md" if (ROOT / path).is_dir() else f"source/{visible}.md"


def written_texts() -> list[str]:
    """The texts that people write: Markdown and notebooks, relative to the repository."""
    found = [ROOT / path for path in TEXTS if (ROOT / path).exists()]
    found += sorted((ROOT / "docs").rglob("*.md")) + sorted((ROOT / "notebooks").glob("*.ipynb"))
    return [path.relative_to(ROOT).as_posix() for path in found]


def target(path: str, url: str) -> str | None:
    """What a link refers to, relative to the repository.

    Args:
      path: of the text with the link, relative to the repository.
      url: of the link.

    Returns:
      The path, or None if the link leaves the repository or stays on its page.
    """
    if not is_relative(url) or not urlsplit(url).path:
        return None
    linked = (ROOT / path).parent / unquote(urlsplit(url).path)
    resolved = linked.resolve()
    return resolved.relative_to(ROOT).as_posix() if resolved.is_relative_to(ROOT) else None


def linked_sources(texts: list[str]) -> list[str]:
    """The files and folders that texts, or the API reference, link to and that are no texts.

    A folder's page lists its files, so they are among them.
    """
    found = set(reference())
    for text in texts:
        for _, url in Html(render(ROOT / text)).references:
            path = target(text, url)
            if (
                path is None
                or not (ROOT / path).exists()
                or not page_of(path).startswith("source/")
            ):
                continue
            found.add(path)
            if (ROOT / path).is_dir():
                found.update(listing(path))
    return sorted(found)


def listing(folder: str) -> list[str]:
    """The files of a folder, relative to the repository."""
    files = (path for path in (ROOT / folder).iterdir() if path.is_file())
    names = (path.relative_to(ROOT).as_posix() for path in files if path.name[0] != ".")
    return sorted(names)


def reference() -> dict[str, str]:
    """The modules with a page in the API reference: each one's file, and the page's source."""
    found = {}
    for path in sorted((ROOT / "gpt2_jax").rglob("*.py")):
        file = path.relative_to(ROOT)
        if path.name != "__init__.py" and not file.as_posix().startswith(NOT_IN_REFERENCE):
            inner = file.relative_to("gpt2_jax").with_suffix(".md")
            found[file.as_posix()] = f"api/{inner.as_posix()}"
    return {**found, "parity/reference.py": "api/parity/reference.md"}
