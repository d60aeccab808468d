"""The token inspector as a page for a browser: one file, which loads nothing from anywhere."""

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt2_jax import web_page
from gpt2_jax.generation.inspector import (
    LEVELS,
    Alternative,
    ExplainedText,
    ExplainedToken,
    percent,
    visible,
)
from gpt2_jax.web_page import shown


def write_page(path: Path, texts: Sequence[ExplainedText], *, note: str = "") -> None:
    """Writes the page, whole or not at all.

    Raises:
      UserError: if the file cannot be written.
    """
    web_page.write_page(path, inspector_page(texts, note=note))


def inspector_page(texts: Sequence[ExplainedText], *, note: str = "") -> str:
    """A page that shows the texts coloured, and a card for the token that is pointed at.

    Args:
      texts: one sample after another.
      note: a line at the top, such as the model and the sampling rules.
    """
    names = [*(name for name, _ in LEVELS), "below 1%"]
    return web_page.fill(
        __package__,
        "inspector.html",
        note=f'<p class="note">{shown(note)}</p>' if note else "",
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
        f'<div class="text" dir="auto" translate="no"><span class="prompt">{shown(text.prompt)}'
        f'</span><span role="listbox" aria-orientation="horizontal" '
        f'aria-label="generated tokens">{tokens}</span></div>'
        f'<p class="summary">{facts}</p></section>'
    )


def _token(token: ExplainedToken, *, first: bool) -> str:
    text = shown(token.text)
    # The line breaks at its end come after it, so that it ends where its last sign is.
    breaks = len(text) - len(text.rstrip("\n"))
    probability = percent(token.probability)
    return (
        f'<span class="token c{token.level}" role="option" tabindex="{0 if first else -1}" '
        f'data-percent="{html.escape(probability)}" '
        f'aria-label="{html.escape(visible(token.text))}, {html.escape(probability)}">'
        f"{text[: len(text) - breaks]}</span>{text[len(text) - breaks :]}"
    )


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
