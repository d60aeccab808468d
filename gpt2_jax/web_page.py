"""Pages for a browser: one file each, which loads nothing from anywhere."""

import base64
import errno
import functools
import hashlib
import html
import importlib.resources
import re
import string
from pathlib import Path

from gpt2_jax.errors import UserError
from gpt2_jax.files import write_text
from gpt2_jax.generation.inspector import spelt


def write_page(path: Path, page: str) -> None:
    """Writes a page, whole or not at all.

    Raises:
      UserError: if the file cannot be written.
    """
    try:
        if not path.name:
            raise IsADirectoryError(errno.EISDIR, "Is a directory")
        write_text(path, page)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; give a file in a directory that exists"
        ) from None


def fill(package: str, name: str, /, **parts: str) -> str:
    """A page from its template.

    Args:
      package: where the template is.
      name: the template's file, a `string.Template` with one style and one script of its own;
        `$policy` becomes a Content-Security-Policy that allows these and nothing else.
      **parts: HTML by name.
    """
    return _template(package, name).substitute(parts, policy=_policy(package, name))


def shown(text: str) -> str:
    """HTML of a text; what cannot be seen is spelt out in italics."""
    pieces = []
    for character in text:
        word = spelt(character)
        if character == "\n":
            pieces.append('<i class="end">↵</i>\n')
        elif word == character or character == "\\":
            pieces.append(html.escape(character))
        else:
            pieces.append(f"<i>{html.escape(word)}</i>")
    return "".join(pieces)


def plain(text: str) -> str:
    """The same without elements, for a title or an attribute; line breaks are spelt out too."""
    return html.escape("".join(sign if sign == "\\" else spelt(sign) for sign in text))


@functools.cache
def _template(package: str, name: str) -> string.Template:
    page = importlib.resources.files(package).joinpath(name)
    return string.Template(page.read_text(encoding="utf-8"))


def _policy(package: str, name: str) -> str:
    rules = ["default-src 'none'", "img-src data:"]
    for kind in ("style", "script"):
        found = re.search(f"<{kind}>(.*?)</{kind}>", _template(package, name).template, re.DOTALL)
        assert found is not None
        digest = base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
        rules.append(f"{kind}-src 'sha256-{digest}'")
    return "; ".join(rules)
