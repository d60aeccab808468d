"""A comparison of models as a page for a browser: one file, which loads nothing from anywhere."""

import html
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpt2_jax import web_page
from gpt2_jax.comparison.held_out import Change, HeldOut, Summary
from gpt2_jax.comparison.scored_tokens import Token
from gpt2_jax.comparison.side_by_side import Comparison, Continuation
from gpt2_jax.comparison.tables import ENDINGS, NOTE, UNITS, ratio, signed, title
from gpt2_jax.generation.inspector import visible
from gpt2_jax.web_page import plain, shown

THRESHOLDS = (0.05, 0.25, 1.0)
"""Nats at which a difference gets a stronger colour, up or down."""
PASSAGE = 512
"""tokens of the held-out text that are shown, at most, if a window is no longer"""


def write_page(
    path: Path, comparison: Comparison, *, name: str, facts: Mapping[str, str], count: int
) -> None:
    """Writes the page, whole or not at all.

    Raises:
      UserError: if the file cannot be written.
    """
    web_page.write_page(path, comparison_page(comparison, name=name, facts=facts, count=count))


def comparison_page(
    comparison: Comparison, *, name: str, facts: Mapping[str, str], count: int
) -> str:
    """The page: held-out loss, largest changes, a passage and the texts, coloured by difference.

    Args:
      comparison: what was compared.
      name: of the base.
      facts: what else there is to know, by name: adapters, sampling, seed.
      count: how many of the largest changes to show, each way.
    """
    held_out = comparison.held_out
    return web_page.fill(
        __package__,
        "page.html",
        name=plain(name),
        title=shown(name),
        facts="".join(
            f"<div><dt>{shown(key)}</dt><dd>{shown(value)}</dd></div>"
            for key, value in facts.items()
        ),
        key=_key(comparison.models),
        models="".join(f"<li>{plain(model)}</li>" for model in comparison.models),
        summary=_summary(held_out, comparison.models) if held_out is not None else "",
        tokens=_tokens(held_out, comparison, count) if held_out is not None else "",
        texts=_texts(comparison) if comparison.continuations else "",
    )


def level(difference: float) -> str:
    """The class of a difference in nats: better-3 ... better-1, same, worse-1 ... worse-3."""
    strength = sum(abs(difference) >= threshold for threshold in THRESHOLDS)
    if difference != difference:  # NaN
        strength = len(THRESHOLDS)
    if not strength:
        return "same"
    return f"better-{strength}" if difference < 0 else f"worse-{strength}"


def _key(models: Sequence[str]) -> str:
    bounds = [*(f"{threshold:g}" for threshold in THRESHOLDS), ""]
    better = [
        (f"better-{i}", f"{low} to {high}" if high else f"{low} or more")
        for i, (low, high) in enumerate(itertools.pairwise(bounds), 1)
    ]
    worse = [(kind.replace("better", "worse"), words) for kind, words in better]
    chips = [f'<li class="{kind}">{words}</li>' for kind, words in better[::-1]]
    chips += [f'<li class="same">less than {bounds[0]}</li>']
    chips += [f'<li class="{kind}">{words}</li>' for kind, words in worse]
    options = "".join(f'<option value="{i}">{plain(m)}</option>' for i, m in enumerate(models[1:]))
    choice = (
        f'<label>colours of <select id="adapter">{options}</select></label>'
        if len(models) > 2
        else ""
    )
    return (
        f'<ul aria-label="Colours"><li class="word">better by</li>{"".join(chips)}'
        f'<li class="word">nats worse</li></ul>{choice}'
    )


def _summary(held_out: HeldOut, models: Sequence[str]) -> str:
    summaries = held_out.summaries(models)
    rows = "".join(_row(one, summaries[0]) for one in summaries)
    names = ("model", "loss", "difference", "perplexity", "ratio", "improved", "worsened")
    heads = "".join(f'<th scope="col">{name}</th>' for name in names)
    return (
        f"<section><h2>Held-out text</h2>"
        f'<p class="note">{shown(title(held_out))}. {NOTE} {UNITS} '
        f"Improved and worsened are shares of the tokens with a smaller and a larger loss than "
        f"under the base.</p>"
        f'<table class="plain stacked"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'
        f"</section>"
    )


def _tokens(held_out: HeldOut, comparison: Comparison, count: int) -> str:
    first, tokens = held_out.passage(PASSAGE, comparison.notation)
    adapted = range(1, len(comparison.models))
    changes = "".join(_changes(held_out, comparison, model, count) for model in adapted)
    return (
        f'{changes}<section><h2>A passage of the held-out text</h2><p class="note">'
        f"Its first {len(tokens):,} tokens.</p>{_text(first, tokens)}</section>"
    )


def _row(one: Summary, base: Summary) -> str:
    kind, own = _direction(one.difference), one is base
    cells = {
        "loss": f"{one.loss:.4f}",
        "difference": "" if own else f'<b class="{kind}">{signed(one.difference, 4)}</b>',
        "perplexity": f"{one.perplexity:,.2f}",
        "ratio": "" if own else f'<b class="{kind}">{ratio(one, base)}</b>',
        "improved": "" if own else f"{one.improved:.1%}",
        "worsened": "" if own else f"{one.worsened:.1%}",
    }
    body = "".join(f'<td data-label="{name}">{cell}</td>' for name, cell in cells.items())
    return f'<tr><th scope="row">{shown(one.model)}</th>{body}</tr>'


def _changes(held_out: HeldOut, comparison: Comparison, model: int, count: int) -> str:
    gained, lost = held_out.largest_changes(model, count, comparison.notation)
    tables = "".join(
        f"<div><h3>{heading}</h3>{_change_table(changes, model)}</div>"
        for heading, changes in (("Gained most", gained), ("Lost most", lost))
    )
    return (
        f"<section><h2>Largest changes: {shown(comparison.models[model])}</h2>"
        f'<div class="sides wide">{tables}</div></section>'
    )


def _change_table(changes: Sequence[Change], model: int) -> str:
    if not changes:
        return '<p class="note">None.</p>'
    rows = "".join(
        f'<tr><td class="place" dir="auto"><span class="context">{shown(change.context[-48:])}'
        f'</span><mark class="{level(change.token.difference(model))}">'
        f"{shown(change.token.text)}</mark></td><td>{change.token.losses[0]:.2f}</td>"
        f"<td>{change.token.losses[model]:.2f}</td>"
        f"<td><b>{signed(change.token.difference(model), 2)}</b></td></tr>"
        for change in changes
    )
    return (
        f'<table class="plain changes"><thead><tr><th scope="col">token in its context</th>'
        f'<th scope="col">before</th><th scope="col">after</th><th scope="col">difference</th>'
        f"</tr></thead><tbody>{rows}</tbody></table>"
    )


def _texts(comparison: Comparison) -> str:
    prompts: dict[int, list[Continuation]] = {}
    for one in comparison.continuations:
        prompts.setdefault(one.prompt_index, []).append(one)
    return "".join(
        f"<section><h2>Prompt{f' {index + 1}' if len(prompts) > 1 else ''}</h2>"
        f'<div class="text prompt" dir="auto">'
        f"{shown(comparison.notation.decode(texts[0].prompt))}</div>"
        f"{_samples(texts, comparison)}</section>"
        for index, texts in prompts.items()
    )


def _samples(texts: Sequence[Continuation], comparison: Comparison) -> str:
    samples: dict[int, list[str]] = {}
    for one in texts:
        ending = ENDINGS[one.finish_reason]
        tokens = one.tokens(comparison.notation)
        samples.setdefault(one.sample_index, []).append(
            f"<div><h4>{shown(comparison.models[one.model])}</h4>{_text('', tokens)}"
            f'<p class="summary">{_means(tokens, comparison.models)}'
            f"{f' · {ending}' if ending else ''}</p></div>"
        )
    several = len(samples) > 1
    return "".join(
        f"{f'<h3>Sample {index + 1}</h3>' if several else ''}"
        f'<div class="sides">{"".join(sides)}</div>'
        for index, sides in samples.items()
    )


def _means(tokens: Sequence[Token], models: Sequence[str]) -> str:
    """The mean loss of a text under each model."""
    means = [sum(token.losses[m] for token in tokens) / len(tokens) for m in range(len(models))]
    figures = ", ".join(
        f"{shown(n)} <b>{mean:.3f}</b>" for n, mean in zip(models, means, strict=True)
    )
    return f"mean loss: {figures}"


def _text(first: str, tokens: Sequence[Token]) -> str:
    body = "".join(_token(token, index) for index, token in enumerate(tokens))
    return (
        f'<div class="text" dir="auto" translate="no"><span class="prompt">{shown(first)}</span>'
        f'<span role="listbox" aria-orientation="horizontal" aria-label="tokens">{body}</span>'
        f"</div>"
    )


def _token(token: Token, index: int) -> str:
    """A coloured token; the figures are in its title, those of the adapters in data-*."""
    text = shown(token.text)
    # The line breaks at its end come after it, so that it ends where its last sign is.
    breaks = len(text) - len(text.rstrip("\n"))
    differences = [token.difference(model) for model in range(1, len(token.losses))]
    figures = [signed(difference, 2) for difference in differences]
    levels = [level(difference) for difference in differences]
    losses = " ".join(f"{loss:.2f}" for loss in token.losses)
    return (
        f'<span class="token {levels[0]}" role="option" tabindex="{-1 if index else 0}" '
        f'data-levels="{" ".join(levels)}" data-differences="{" ".join(figures)}" '
        f'data-losses="{losses}" data-difference="{figures[0]}" '
        f'title="{html.escape(visible(token.text))}: loss {_arrow(token)}">'
        f"{text[: len(text) - breaks]}</span>{text[len(text) - breaks :]}"
    )


def _arrow(token: Token) -> str:
    after = ", ".join(
        f"{loss:.2f} ({signed(token.difference(model), 2)})"
        for model, loss in enumerate(token.losses[1:], 1)
    )
    return f"{token.losses[0]:.2f} → {after}"


def _direction(difference: float) -> str:
    return "good" if difference < 0 else "bad" if difference > 0 else ""
