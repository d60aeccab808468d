"""How far two models are apart at every place, as a table for a terminal."""

import itertools
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from parity.activations import SITES, Difference, first_difference
from parity.charts import short


def layer_table(model: str, differences: Sequence[Difference]) -> Table:
    """Relative errors: a row for each block and for what is outside of blocks, a column a site.

    What is more than rounding is marked, the first such place with two marks.

    Args:
      model: what JAX is compared with.
      differences: in the order of computation.
    """
    first = first_difference(list(differences))
    table = Table(title=f"relative error of JAX's activations against {model}")
    table.add_column("place")
    for site in SITES:
        table.add_column(site, overflow="fold", min_width=5)
    for row, members in itertools.groupby(differences, key=lambda one: one.row):
        cells = [_cell(one, one is first) for one in members]
        table.add_row(row, *cells)
    if first is not None:
        table.caption = f"the first that is more than rounding (!!): {first.place}"
    return table


def _cell(one: Difference, first: bool) -> Text:
    if one.passed:
        return Text(short(one.relative))
    return Text(f"{'!!' if first else '!'}{short(one.relative)}", style="bold red")
