"""The table of `benchmark.py hellaswag`, for a terminal of 80 columns."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from gpt2_jax.benchmarks.hellaswag import HellaSwagFigures, Padding
from gpt2_jax.benchmarks.hellaswag_scorers import TITLES
from gpt2_jax.benchmarks.report import plain_table

VALIDATION_ITEMS = 10_042

LEGEND = f"""\
whole set   minutes for {VALIDATION_ITEMS:,} items at that speed, without compiling
ours is     how many times as fast ours is, the median of the rounds
differs     the largest difference between its loss of an ending and ours, nats
"""


def print_hellaswag(console: Console, measured: Sequence[HellaSwagFigures]) -> None:
    """A table for each dtype, and who was left out."""
    for figures in measured:
        console.print(speed_table(figures))
        for name, reason in figures.left_out.items():
            console.print(f"{TITLES[name]} is left out: {reason}", markup=False, soft_wrap=True)
    console.print(LEGEND, markup=False, soft_wrap=True)


def speed_table(figures: HellaSwagFigures) -> Table:
    """One row for each contestant; `LEGEND` explains the columns."""
    table = plain_table(figures.dtype)
    table.add_column("", no_wrap=True)
    for heading in ("device", "batch", "items/s", "whole set", "ours is", "differs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, of in figures.measured.items():
        ratio, difference = figures.ratio(name), figures.difference(name)
        is_other = name != "ours"
        table.add_row(
            TITLES[name],
            of.device,
            "" if of.batch_size is None else str(of.batch_size),
            f"{of.items_per_second:.2f}",
            f"{VALIDATION_ITEMS / of.items_per_second / 60:.1f}",
            f"{ratio:.2f}x" if ratio and is_other else "",
            f"{difference:.1e}" if difference is not None and is_other else "",
        )
    return table


def padding_lines(padding: Padding) -> list[str]:
    """What rows of few lengths cost, and what sharing contexts saves."""
    lines = {
        "tokens of the texts, each by itself": f"{padding.texts:,}",
        "tokens of the rows, contexts shared": f"{padding.rows:,}",
        "computed per token, were each text a row": f"{padding.computed_texts / padding.texts:.3f}",
        "computed per token of the rows": f"{padding.computed / padding.rows:.3f}",
        "computed per token of the texts": f"{padding.computed / padding.texts:.3f}",
        "predictions computed per prediction": (
            f"{padding.computed_predictions / padding.predictions:.3f}"
        ),
    }
    return [f"{what:44}{value:>12}" for what, value in lines.items()]
