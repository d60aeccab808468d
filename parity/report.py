"""What a validation found, as a page for a browser: one file, which loads nothing from anywhere."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from gpt2_jax import web_page
from gpt2_jax.web_page import plain, shown
from parity import charts
from parity.activations import Difference, first_difference
from parity.charts import short
from parity.environment import environment as environment
from parity.heat_map import LEVELS, anchor, heat_map
from parity.outcomes import Check
from parity.trajectory import LOSS_BOUND, Curve


@dataclasses.dataclass(frozen=True)
class GreedyText:
    """One prompt continued greedily by JAX and by Hugging Face."""

    prompt: str
    ours: str
    """the continuation without the prompt"""
    theirs: str
    same: int
    """how many tokens are equal before the first that is not"""
    total: int
    """how many tokens there are"""


@dataclasses.dataclass(frozen=True)
class Report:
    """All that the page shows.

    Attributes:
      title: the model and its weights.
      checks: in the order of the table.
      differences: what `check_activations` found, by the name of the PyTorch model.
      logits: [T, V] of JAX and of Hugging Face for one text.
      greedy: one or more prompts.
      curves: training in JAX and in PyTorch, if there was any.
      environment: versions and hardware, as `environment` gives them.
      dtype: what JAX trained in.
    """

    title: str
    checks: Sequence[Check]
    differences: Mapping[str, Sequence[Difference]]
    logits: tuple[np.ndarray, np.ndarray]
    greedy: Sequence[GreedyText]
    curves: tuple[Curve, Curve] | None
    environment: Mapping[str, str]
    dtype: str = "float32"

    @property
    def firsts(self) -> dict[str, Difference]:
        """The first place that differs, by model; without the models that agree everywhere."""
        found = {model: first_difference(list(all_)) for model, all_ in self.differences.items()}
        return {model: first for model, first in found.items() if first is not None}

    @property
    def failed(self) -> list[int]:
        """Which checks failed, by their index."""
        return [index for index, check in enumerate(self.checks) if not check.passed]


def write_report(path: Path, report: Report) -> None:
    """Writes the page, whole or not at all.

    Raises:
      UserError: if the file cannot be written.
    """
    web_page.write_page(path, report_page(report))


def report_page(report: Report) -> str:
    """The page: verdict, checks, heat maps, logits, greedy texts, training, environment."""
    levels = "".join(f'<i class="l{level}"></i>' for level in range(LEVELS))
    return web_page.fill(
        __package__,
        "report.html",
        name=plain(report.title),
        title=shown(report.title),
        verdict=_verdict(report),
        checks="".join(_check(index, check) for index, check in enumerate(report.checks)),
        levels=levels,
        maps="".join(_map(model, list(found)) for model, found in report.differences.items()),
        logits=_logits(*report.logits),
        greedy="".join(map(_greedy, report.greedy)),
        curves=_curves(*report.curves, LOSS_BOUND[report.dtype]) if report.curves else "",
        environment="".join(
            f'<tr><th scope="row">{shown(name)}</th><td dir="auto">{shown(value)}</td></tr>'
            for name, value in report.environment.items()
        ),
    )


def _verdict(report: Report) -> str:
    count = len(report.checks)
    if not count:
        return '<div class="verdict over"><p>✗ Nothing was compared</p></div>'
    if not report.failed and not report.firsts:
        places = len(next(iter(report.differences.values()), ()))
        models = " and ".join(map(shown, report.differences))
        seen = f"<p>All {places} places of the computation agree with PyTorch ({models}).</p>"
        headline = f"✓ All {count} checks pass" if count > 1 else "✓ The check passes"
        return f'<div class="verdict ok"><p>{headline}</p>{seen if places else ""}</div>'
    if report.firsts:
        model, first = min(
            report.firsts.items(), key=lambda found: _position(report, found[0], found[1])
        )
        target, where = anchor(model, first.place), first.place
    else:
        target, where = f"check-{report.failed[0]}", report.checks[report.failed[0]].name
    how = "Differs first at" if report.firsts else "Differs:"
    lines = [
        f'<li>against {shown(model)} first at <a href="#{anchor(model, first.place)}">'
        f"{shown(first.place)}</a>: relative error {short(first.relative, 1)}, "
        f"allowed {short(first.allowed, 1)}</li>"
        for model, first in report.firsts.items()
    ]
    return (
        f'<div class="verdict over"><p>✗ {how} <a href="#{target}">{shown(where)}</a></p>'
        f"<ul><li>{len(report.failed)} of {count} checks fail</li>{''.join(lines)}</ul></div>"
    )


def _position(report: Report, model: str, place: Difference) -> int:
    return list(report.differences[model]).index(place)


def _check(index: int, check: Check) -> str:
    cells = [
        shown(check.name),
        " x ".join(map(str, check.shape)),
        shown(check.dtype),
        f"{shown(check.figure)}{f'<small>at {shown(check.where)}</small>' if check.where else ''}",
        shown(check.allowed),
        "<b>✓ ok</b>" if check.passed else "<b>✗ differs</b>",
    ]
    kind = "ok" if check.passed else "over"
    row = f'<tr id="check-{index}" class="{kind}">' + "".join(f"<td>{cell}</td>" for cell in cells)
    if not check.details:
        return f"{row}</tr>"
    details = "".join(f'<li dir="auto">{shown(detail)}</li>' for detail in check.details)
    return f'{row}</tr><tr class="details"><td colspan="{len(cells)}"><ul>{details}</ul></td></tr>'


def _map(model: str, differences: list[Difference]) -> str:
    first = first_difference(differences)
    beyond = sum(not one.passed for one in differences)
    if first is None:
        text = f"all {len(differences)} places agree within rounding"
    else:
        text = (
            f"<b>{beyond} of {len(differences)} places differ</b>, the first at "
            f'<a href="#{anchor(model, first.place)}">{shown(first.place)}</a>'
        )
    return f"<h3>{shown(model)}: {text}</h3>{heat_map(model, differences)}"


def _facts(*facts: tuple[str, str]) -> str:
    rows = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    return f"<dl>{rows}</dl>"


def _logits(ours_TV: np.ndarray, theirs_TV: np.ndarray) -> str:
    if ours_TV.shape != theirs_TV.shape:
        return f'<p class="over">✗ {ours_TV.shape} in JAX, {theirs_TV.shape} in Hugging Face</p>'
    ours, theirs = (np.asarray(all_, np.float64).ravel() for all_ in (ours_TV, theirs_TV))
    finite = np.isfinite(ours) & np.isfinite(theirs)
    strange = int((~finite).sum())
    warning = (
        f'<p class="over">✗ {strange:,} of {ours.size:,} are NaN or infinite, '
        "and not in the figure.</p>"
    )
    if not finite.any():
        return warning
    equal = np.mean(ours == theirs)
    ours, theirs = ours[finite], theirs[finite]
    chosen = charts.points_to_draw(ours, theirs)
    choices = int((ours_TV.argmax(-1) == theirs_TV.argmax(-1)).sum())
    facts = _facts(
        ("logits", f"{finite.size:,}"),
        ("drawn, with the largest differences", f"{chosen.size:,}"),
        ("largest difference", short(float(np.abs(ours - theirs).max()), 1)),
        ("mean difference", short(float(np.abs(ours - theirs).mean()), 1)),
        ("equal to the last bit", f"{equal:.1%}"),
        ("same likeliest token", f"{choices} of {ours_TV.shape[0]}"),
    )
    figure = charts.scatter(ours[chosen], theirs[chosen])
    return f'{warning if strange else ""}<div class="figure">{figure}{facts}</div>'


def _greedy(text: GreedyText) -> str:
    pairs = enumerate(zip(text.ours, text.theirs, strict=False))
    shorter = min(len(text.ours), len(text.theirs))
    common = next((index for index, (a, b) in pairs if a != b), shorter)
    kind, mark = ("ok", "✓") if text.same >= text.total else ("over", "✗")
    count = f"{text.same} of {text.total} tokens equal"
    if text.same < text.total and text.ours == text.theirs:
        count += "; other tokens, which read the same"
    sides = "".join(
        f'<div><h4>{model}</h4><p class="text" dir="auto" translate="no">'
        f'<span class="prompt">{shown(text.prompt)}</span>{_marked(side, common, text)}</p>'
        "</div>"
        for model, side in (("JAX", text.ours), ("Hugging Face", text.theirs))
    )
    return f'<p class="{kind}"><b>{mark} {count}</b></p><div class="sides">{sides}</div>'


def _marked(side: str, common: int, text: GreedyText) -> str:
    if text.ours == text.theirs:
        return shown(side)
    rest = shown(side[common:]) or '<i title="the text ends here">end</i>'
    return f"{shown(side[:common])}<mark>{rest}</mark>"


def _curves(ours: Curve, theirs: Curve, bound: float) -> str:
    apart = charts.distances(ours.losses, theirs.losses)
    worst = int(np.argmax(np.nan_to_num(apart, nan=np.inf)))
    within = len(ours.losses) == len(theirs.losses) and bool((apart <= bound).all())
    facts = _facts(
        ("steps", f"{len(ours.losses)} in JAX, {len(theirs.losses)} in PyTorch"),
        ("last loss in JAX", f"{ours.losses[-1]:.6f}"),
        ("last loss in PyTorch", f"{theirs.losses[-1]:.6f}"),
        ("largest difference", f"{short(float(apart[worst]), 1)} at step {worst}"),
        ("allowed", short(bound)),
        ("result", '<b class="ok">✓ ok</b>' if within else '<b class="over">✗ differs</b>'),
    )
    figure = charts.losses(ours.losses, theirs.losses, bound)
    return f'<section><h2>Training</h2><div class="figure">{figure}{facts}</div></section>'
