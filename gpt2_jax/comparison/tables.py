"""A comparison of models in a terminal: rich tables, or one JSON object."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from gpt2_jax.comparison.held_out import Change, HeldOut, Summary
from gpt2_jax.comparison.side_by_side import Comparison
from gpt2_jax.generation.inspector import spelt, visible

NOTE = "Each window starts without context, so its first tokens cost more than in a running text."
UNITS = "Losses are means in nats/token."
ENDINGS = {"stop": "ended by itself", "context": "the context is full", "length": ""}
"""Why a text is no longer, by its finish reason."""
_CONTEXT_SHOWN = 32
_STYLES = {-1: "green", 0: "", 1: "red"}


def tables(comparison: Comparison, count: int) -> Iterator[Table]:
    """All that a terminal shows.

    Args:
      comparison: what was compared.
      count: how many of the largest changes to show, each way.
    """
    if comparison.held_out is not None:
        yield summary_table(comparison.held_out, comparison.models)
        for model in range(1, len(comparison.models)):
            yield changes_table(comparison, model, count)
    for prompt_index in sorted({one.prompt_index for one in comparison.continuations}):
        yield texts_table(comparison, prompt_index)


def summary_table(held_out: HeldOut, models: tuple[str, ...]) -> Table:
    """Loss and perplexity before and after, a row for each model."""
    table = Table(
        title=Text(title(held_out)),
        title_justify="left",
        caption=Text(f"{NOTE} {UNITS}"),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("model", overflow="fold")
    for name in ("loss", "difference", "perplexity", "ratio", "improved", "worsened"):
        table.add_column(name, justify="right", no_wrap=True)
    base, *adapted = held_out.summaries(models)
    table.add_row(Text(base.model), f"{base.loss:.4f}", "", f"{base.perplexity:,.2f}")
    for one in adapted:
        style = _style(one.difference)
        table.add_row(
            Text(one.model),
            f"{one.loss:.4f}",
            Text(signed(one.difference, 4), style),
            f"{one.perplexity:,.2f}",
            Text(ratio(one, base), style),
            f"{one.improved:.1%}",
            f"{one.worsened:.1%}",
        )
    return table


def changes_table(comparison: Comparison, model: int, count: int) -> Table:
    """The tokens of the held-out text that a model gained and lost most on, nats."""
    assert comparison.held_out is not None
    gained, lost = comparison.held_out.largest_changes(model, count, comparison.notation)
    table = Table(
        title=Text(f"{comparison.models[model]}: largest changes of a token's loss, nats"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("after", justify="right", no_wrap=True, max_width=_CONTEXT_SHOWN)
    table.add_column("token", overflow="fold")
    for name in ("base", comparison.models[model], "difference"):
        table.add_column(name, justify="right")
    for changes in (gained, lost):
        for change in changes:
            _add_change(table, change, model)
        table.add_section()
    return table


def texts_table(comparison: Comparison, prompt_index: int) -> Table:
    """What the models wrote after one prompt, side by side: a row for each sample."""
    notation = comparison.notation
    texts = [one for one in comparison.continuations if one.prompt_index == prompt_index]
    prompt = _tail(notation.decode(texts[0].prompt), 160)
    table = Table(
        title=Text(f"prompt: {prompt}"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_lines=True,
        expand=True,
    )
    for model in comparison.models:
        table.add_column(Text(model), overflow="fold", ratio=1)
    rows: dict[int, list[Text]] = {}
    for one in texts:
        text = Text(readable(one.text(notation)))
        if ENDINGS[one.finish_reason]:
            text.append(f" ({ENDINGS[one.finish_reason]})", "dim")
        rows.setdefault(one.sample_index, []).append(text)
    for row in rows.values():
        table.add_row(*row)
    return table


def title(held_out: HeldOut) -> str:
    """What was scored."""
    N, T = held_out.losses_MNT.shape[1:]
    windows = f"{N:,} windows of {T:,} tokens" if N > 1 else f"1 window of {T:,} tokens"
    return f"{held_out.name}: {windows}"


def signed(difference: float, digits: int) -> str:
    """A difference with its sign; what rounds to 0 has none."""
    text = f"{difference:+.{digits}f}"
    return text if float(text) else text[1:]


def ratio(one: Summary, base: Summary) -> str:
    """A perplexity against the base's, such as "-20.1%"; nothing if one is not finite."""
    change = one.perplexity / base.perplexity - 1
    if not math.isfinite(change):
        return ""
    return f"{change:+,.1%}" if one.perplexity != base.perplexity else "0.0%"


def readable(text: str) -> str:
    """A text in which nothing acts on a terminal; lines and tabs stay."""
    return "".join(sign if sign in "\n\t\\" else spelt(sign) for sign in text)


def _add_change(table: Table, change: Change, model: int) -> None:
    token = change.token
    difference = token.difference(model)
    table.add_row(
        Text(_tail(change.context, _CONTEXT_SHOWN), "dim"),
        Text(visible(token.text), "bold"),
        f"{token.losses[0]:.2f}",
        f"{token.losses[model]:.2f}",
        Text(signed(difference, 2), _style(difference)),
    )


def _style(difference: float) -> str:
    return _STYLES[(difference > 0) - (difference < 0)]


def _tail(text: str, length: int) -> str:
    """The end of a text on one line, as wide as so many letters at most."""
    line = "".join(sign if sign == "\\" else spelt(sign) for sign in text)
    if cell_len(line) <= length:
        return line
    line = line[-length:]
    while cell_len(line) >= length:
        line = line[1:]
    return f"\N{HORIZONTAL ELLIPSIS}{line}"


def to_json(comparison: Comparison, count: int) -> dict[str, Any]:
    """All figures, for a program; what is not finite is null.

    Args:
      comparison: what was compared.
      count: how many of the largest changes to tell of, each way.
    """
    models, notation, held_out = comparison.models, comparison.notation, comparison.held_out
    fields: dict[str, Any] = {"models": list(models), "held_out": None}
    if held_out is not None:
        changes = [held_out.largest_changes(m, count, notation) for m in range(len(models))]
        fields["held_out"] = {
            "name": held_out.name,
            "windows": len(held_out.windows_NT),
            "sequence_length": held_out.windows_NT.shape[1] - 1,
            "models": [
                _finite(summary._asdict())
                | {"gained": list(map(_change_to_json, g)), "lost": list(map(_change_to_json, w))}
                for summary, (g, w) in zip(held_out.summaries(models), changes, strict=True)
            ],
        }
    fields["texts"] = [
        {
            "prompt_index": one.prompt_index,
            "sample_index": one.sample_index,
            "model": models[one.model],
            "prompt": notation.decode(one.prompt),
            "text": one.text(notation),
            "tokens": list(one.new),
            "finish_reason": one.finish_reason,
            "losses": [[_number(loss) for loss in t.losses] for t in one.tokens(notation)],
        }
        for one in comparison.continuations
    ]
    return fields


def _change_to_json(change: Change) -> dict[str, Any]:
    token = change.token
    return {
        "token": token.id,
        "text": _whole(token.text),
        "context": _whole(change.context),
        "losses": [_number(loss) for loss in token.losses],
    }


def _whole(text: str) -> str:
    """U+FFFD for bytes that are no whole character."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def _finite(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _number(v) if isinstance(v, float) else v for k, v in fields.items()}


def _number(value: float) -> float | None:
    """JSON has neither infinity nor NaN."""
    return value if math.isfinite(value) else None
