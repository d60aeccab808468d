"""Notebooks as Markdown: cells as they are, then what they showed. Nothing is executed."""

import base64
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

ANSI_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class NotebookPage(NamedTuple):
    """A notebook's text, and its pictures by file name."""

    markdown: str
    pictures: dict[str, bytes]


def notebook_page(path: Path) -> NotebookPage:
    """Reads a notebook with the outputs that are stored in it.

    Args:
      path: a notebook in nbformat 4.

    Returns:
      Markdown, with a link to the file itself below the first cell; its pictures lie beside it.
    """
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"], 1):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(fenced(source, "python"))
        shown = []
        for place, output in enumerate(cell["outputs"], 1):
            name = f"{path.stem}_{number}_{place}.png"
            shown.append(_output(output, name, pictures))
        if shown:
            parts.append('<div class="output" markdown>\n\n' + "\n\n".join(shown) + "\n\n</div>")
    parts.insert(1, f'<a href="{path.name}" download>Download the notebook</a>')
    return NotebookPage("\n\n".join(parts) + "\n", pictures)


def fenced(code: str, language: str, options: str = "") -> str:
    """A code block, fenced by more backticks than any line of it begins with."""
    longest = max((len(ticks) for ticks in re.findall(r"^\s*(`{3,})", code, re.M)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence} {{ .{language} {options}}}\n{code.rstrip()}\n{fence}"


def _output(output: dict[str, Any], name: str, pictures: dict[str, bytes]) -> str:
    """One output of a cell: of several forms the one that shows most."""
    if output["output_type"] == "stream":
        return _text(output["text"])
    if output["output_type"] == "error":
        return _text(output["traceback"])
    forms = output["data"]
    if "image/png" in forms:
        pictures[name] = base64.b64decode("".join(forms["image/png"]))
        return f"![What the cell above drew]({name})"
    if "text/html" in forms:
        return "<div>\n" + "".join(forms["text/html"]) + "\n</div>"
    return _text(forms["text/plain"])


def _text(text: str | list[str]) -> str:
    return fenced(ANSI_COLOUR.sub("", "".join(text)), "text")
