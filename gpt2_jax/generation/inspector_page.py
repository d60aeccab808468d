"""The token inspector as a page for a browser: one file, which loads nothing from anywhere."""

import base64
import errno
import functools
import hashlib
import html
import importlib.resources
import json
import math
import re
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt2_jax.errors import UserError
from gpt2_jax.files import write_text
from gpt2_jax.generation.inspector import (
    LEVELS,
    Alternative,
    ExplainedText,
    ExplainedToken,
    percent,
    spelt,
    visible,
)


def write_page(path: Path, texts: Sequence[ExplainedText], *, note: str = "") -> None:
    """Writes the page, whole or not at all.

    Raises:
      UserError: if the file cannot be written.
    """
    try:
        if not path.name:
            raise IsADirectoryError(errno.EISDIR, "Is a directory")
        write_text(path, inspector_page(texts, note=note))
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; give a file in a directory that exists"
        ) from None


def inspector_page(texts: Sequence[ExplainedText], *, note: str = "") -> str:
    """A page that shows the texts coloured, and a card for the token that is pointed at.

    Args:
      texts: one sample after another.
      note: a line at the top, such as the model and the sampling rules.
    """
    names = [*(name for name, _ in LEVELS), "below 1%"]
    return _template().substitute(
        policy=_policy(),
        note=f'<p class="note">{_shown(note)}</p>' if note else "",
        legend="\n".join(f'<li class="c{level}">{name}</li>' for level, name in enumerate(names)),
        samples="\n".join(
            _sample(text, f"Sample {number}" if len(texts) > 1 else "")
            for number, text in enumerate(texts, 1)
        ),
        cards=_json([_card(token) for text in texts for token in text.tokens]),
    )


def _sample(text: ExplainedText, heading: str) -> str:
    tokens = "".join(_token(token, first=not index) for index, token in enumerate(text.tokens))
    facts = "".join(f"<span>{name} <b>{value}</b></span>" for name, value in text.facts)
    return (
        f'<section class="sample">{f"<h2>{heading}</h2>" if heading else ""}'
        f'<div class="text" dir="auto" translate="no"><span class="prompt">{_shown(text.prompt)}'
        f'</span><span role="listbox" aria-orientation="horizontal" '
        f'aria-label="generated tokens">{tokens}</span></div>'
        f'<p class="summary">{facts}</p></section>'
    )


def _token(token: ExplainedToken, *, first: bool) -> str:
    shown = _shown(token.text)
    # The line breaks at its end come after it, so that it ends where its last sign is.
    breaks = len(shown) - len(shown.rstrip("\n"))
    probability = percent(token.probability)
    return (
        f'<span class="token c{token.level}" role="option" tabindex="{0 if first else -1}" '
        f'data-percent="{html.escape(probability)}" '
        f'aria-label="{html.escape(visible(token.text))}, {html.escape(probability)}">'
        f"{shown[: len(shown) - breaks]}</span>{shown[len(shown) - breaks :]}"
    )


def _shown(text: str) -> str:
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


def _card(token: ExplainedToken) -> dict[str, Any]:
    rows = list(token.alternatives)
    if rows and token.rank is None:
        rows.append(token)
    rest = 1 - math.fsum(row.probability for row in rows)
    return {
        "text": visible(token.text),
        "id": token.id,
        "percent": percent(token.probability),
        "bits": f"{token.bits:.1f}",
        "rank": _rank(token),
        "rows": [_row(row, token) for row in rows],
        "rest": percent(max(rest, 0.0)) if rows else "",
    }


def _rank(token: ExplainedToken) -> str:
    if token.rank is not None:
        return str(token.rank)
    return f"not in top {len(token.alternatives)}" if token.alternatives else ""


def _row(row: Alternative, chosen: ExplainedToken) -> dict[str, Any]:
    return {
        "text": visible(row.text),
        "percent": percent(row.probability),
        "probability": row.probability if math.isfinite(row.probability) else 0.0,
        "chosen": row.id == chosen.id,
    }


def _json(value: object) -> str:
    """JSON that no HTML parser takes for anything but text."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


@functools.cache
def _template() -> string.Template:
    page = importlib.resources.files(__package__).joinpath("inspector.html")
    return string.Template(page.read_text(encoding="utf-8"))


def _policy() -> str:
    """Content-Security-Policy: the page's own style and script, and nothing else, from nowhere."""
    rules = ["default-src 'none'", "img-src data:"]
    for kind in ("style", "script"):
        found = re.search(f"<{kind}>(.*?)</{kind}>", _template().template, re.DOTALL)
        assert found is not None
        digest = base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
        rules.append(f"{kind}-src 'sha256-{digest}'")
    return "; ".join(rules)
