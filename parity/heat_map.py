"""How far two models are apart at every place, as a table of colours in HTML."""

import itertools
import math
from collections.abc import Sequence

from gpt2_jax.generation.inspector import percent
from gpt2_jax.web_page import plain, shown
from parity.activations import SITES, Difference, first_difference
from parity.charts import short

LEVELS = 8
"""Colours of differences within their bound, from palest to darkest."""
EXACT = 1e-8
"""A relative error that has the palest colour: a tenth of the last place of float32."""


def level(difference: Difference) -> int:
    """Which colour it has: equal steps of the logarithm, from `EXACT` to what is allowed."""
    if difference.relative <= EXACT:
        return 0
    if not EXACT < difference.allowed < math.inf:
        return LEVELS - 1
    share = math.log(difference.relative / EXACT) / math.log(difference.allowed / EXACT)
    return min(LEVELS - 1, int(share * LEVELS))


def anchor(model: str, place: str) -> str:
    """The id of a place's cell, to link to."""
    return plain(f"{model} {place}".replace(" ", "-"))


def heat_map(model: str, differences: Sequence[Difference]) -> str:
    """The table: a row for each block and for what is outside of blocks, a column for each site.

    Args:
      model: what JAX is compared with.
      differences: in the order of computation.
    """
    first = first_difference(list(differences))
    title = plain(f"Difference between JAX and {model} by block and site")
    head = "".join(f'<th scope="col"><span>{site}</span></th>' for site in SITES)
    stop = first or next(iter(differences), None)
    rows = []
    for row, members in itertools.groupby(differences, key=lambda one: one.row):
        by_site = {one.site: one for one in members}
        cells = [
            _cell(model, by_site[site], first=by_site[site] is first, stop=by_site[site] is stop)
            if site in by_site
            else "<td></td>"
            for site in ([""] if "" in by_site else SITES)
        ]
        rows.append(f'<tr><th scope="row">{shown(row)}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="scroll"><table class="heat" role="grid" aria-label="{title}">'
        f'<thead><tr><th scope="col">place</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(model: str, one: Difference, *, first: bool, stop: bool) -> str:
    """A place; `first` is the first that differs, `stop` the one that Tab reaches."""
    kind = f"l{level(one)}" if one.passed else "over"
    whole = f' colspan="{len(SITES)}"' if not one.site else ""
    mark = "" if one.passed else '<b title="differs">✗</b> '
    flag = "<em>first</em>" if first else ""
    shape = " x ".join(map(str, one.shape))
    verdict = "" if one.passed else "<br><strong>differs by more than rounding</strong>"
    return (
        f'<td{whole} id="{anchor(model, one.place)}" class="{kind}{" first" * first}" '
        f'tabindex="{0 if stop else -1}">'
        f"<span>{flag}{mark}{short(one.relative)}</span>"
        f'<div class="card"><b>{shown(one.place)}</b> {shape}{verdict}<br>'
        f"relative error {short(one.relative, 2)}<br>allowed {short(one.allowed, 2)}"
        f"{_share(one)}<br>largest difference {short(one.largest, 2)}</div></td>"
    )


def _share(one: Difference) -> str:
    share = one.relative / one.allowed if one.allowed else math.nan
    if not math.isfinite(share):
        return ""
    return f", {percent(share)} of it used" if one.passed else f", exceeded {share:,.1f} times"
