"""Tables of the figures of generation, for a terminal of 80 columns."""

import math
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from gpt2_jax.benchmarks.engines import EngineName, precision, title
from gpt2_jax.benchmarks.figures import EngineFigures, Measured, weight_bytes
from gpt2_jax.benchmarks.generation import GenerationFigures
from gpt2_jax.config import GPT2Config

LEGEND = """\
first ms  until each prompt has its first token, in a warm process
overall   tokens a second, of all prompts together
decode    the same, after the first token
of limit  share of the speed at which memory gives the weights once a token
same      tokens that are gpt2_jax f32's, in each text up to the first other one
x / it    how many times as fast gpt2_jax decodes at that precision
"""


def print_generation(console: Console, figures: GenerationFigures) -> None:
    """A table for each load, one of the first words, and who was left out."""
    for measured, engines in zip(figures.measured, figures.engines, strict=True):
        console.print(speed_table(measured, engines, figures.elsewhere, figures.config))
    console.print(LEGEND, markup=False, soft_wrap=True)
    if figures.first_words:
        console.print(first_word_table(figures.first_words))
    for name, reason in figures.left_out.items():
        console.print(f"{name} is left out: {reason}", markup=False, soft_wrap=True)


def speed_table(
    measured: Measured,
    figures: Mapping[EngineName, EngineFigures],
    elsewhere: Mapping[EngineName, str],
    config: GPT2Config,
) -> Table:
    """One row for each engine; `LEGEND` explains the columns.

    Args:
      measured: what was measured with a load.
      figures: what it means.
      elsewhere: engines that run on another device than ours, and on which.
      config: the model's.
    """
    load, (method, bandwidth) = measured.load, measured.bandwidth
    ours = [name for name in figures if name.startswith("ours")]
    weights = [
        f"{weight_bytes(config, precision(name)) / 1e6:,.0f} MB at {precision(name)}"
        for name in ours
    ]
    table = plain_table(
        f"batch {load.batch}, prompts of {load.prompt_tokens} tokens, {load.new_tokens} new ones",
        f"memory is read at {bandwidth / 1e9:.1f} GB/s ({method})"
        + f", weights are {', '.join(weights)}" * bool(weights),
    )
    table.add_column("engine", no_wrap=True)
    for heading in ("first\nms", "overall\ntokens/s", "decode\ntokens/s", "of\nlimit", "\nsame"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in ours:
        table.add_column(f"{precision(name)}\n/ it", justify="right", no_wrap=True)
    for name, of in figures.items():
        table.add_row(
            f"{title(name)} {elsewhere.get(name, '')}".strip(),
            f"{of.first_token * 1e3:,.0f}",
            _rate(of.overall),
            _rate(of.decode),
            _percent(None if name in elsewhere else of.share_of_limit),
            _percent(of.same_tokens),
            *(_ratio(figures[own].decode, of.decode) for own in ours),
        )
    return table


def first_word_table(seconds: Mapping[str, Sequence[float]]) -> Table:
    """Seconds from the shell to the first word, by precision and run."""
    table = plain_table("generate.py from the shell to its first word")
    table.add_column("precision")
    table.add_column("first run, nothing compiled", justify="right")
    table.add_column("second run", justify="right")
    for name, runs in seconds.items():
        table.add_row(name, *(f"{run:.1f} s" for run in runs))
    return table


def plain_table(title: str, caption: str | None = None) -> Table:
    """A table without frame, so that 80 columns hold much."""
    return Table(
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )


def _rate(rate: float | None) -> str:
    return "" if rate is None else f"{rate:,.{1 if rate < 1000 else 0}f}"


def _percent(share: float | None) -> str:
    # Rounded down: only what is whole is 100%.
    return "" if share is None else f"{math.floor(100 * share)}%"


def _ratio(ours: float | None, its: float | None) -> str:
    return "" if ours is None or its is None else f"{ours / its:.2f}"
