"""The table of `benchmark.py lora`, for a terminal of 80 columns."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from gpt2_jax.benchmarks.lora import LoraFigures
from gpt2_jax.benchmarks.lora_load import TITLES
from gpt2_jax.benchmarks.report import plain_table
from gpt2_jax.benchmarks.step_contest import COMPARED_STEPS, Measured

STEPS = 500

LEGEND = f"""\
{STEPS} steps   what so many take at that speed, in minutes, without compiling
compile s   to trace and compile the step, in a process that starts afresh
GFLOP       of one pass and the optimizer, as XLA counts the compiled program
planned MB  arguments, results and buffers of the compiled program
peak MB     the most held beyond libraries and compiler, told by the system
"""


def print_lora(console: Console, measured: Sequence[LoraFigures]) -> None:
    """A table for each dtype, what it says in a few lines, and who was left out."""
    for figures in measured:
        console.print(step_table(figures))
        for line in (*comparisons(figures), ""):
            console.print(line, markup=False, soft_wrap=True)
        for name, reason in figures.left_out.items():
            console.print(f"{TITLES[name]} is left out: {reason}", markup=False, soft_wrap=True)
    console.print(LEGEND, end="", markup=False, soft_wrap=True)


def step_table(figures: LoraFigures) -> Table:
    """One row for each contestant; `LEGEND` explains the columns."""
    data = figures.settings.data
    passes = data.batch_size // data.micro_batch_size
    table = plain_table(
        f"{figures.settings.dtype}: {data.batch_size} sequences of {data.sequence_length} "
        f"tokens a step, {passes} pass{'es' * (passes > 1)}"
    )
    table.add_column("", no_wrap=True)
    headings = ("step\nms", "\ntokens/s", f"{STEPS}\nsteps", "compile\ns", "\nGFLOP")
    for heading in (*headings, "planned\nMB", "peak\nMB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, of in figures.measured.items():
        table.add_row(TITLES[name], *_cells(of, data.tokens_per_step))
    return table


def comparisons(figures: LoraFigures) -> list[str]:
    """What the contestants are to each other, a line for each thing that could be compared."""
    lora, full, peft = TITLES["lora"], TITLES["full"], TITLES["peft"]
    same, first = figures.loss_difference("peft"), figures.loss_difference("full")
    lines = {
        f"step time, {lora} / {full}": _rounded(figures.ratio("lora", "full"), ".3f"),
        f"FLOPs, {lora} / {full}": _rounded(figures.flops_ratio, ".3f"),
        f"step time, {peft} / {lora}": _rounded(figures.ratio("peft", "lora"), ".2f"),
        f"first loss, {full}, differs by": _rounded(first, ".1e"),
        f"losses of {COMPARED_STEPS} steps, {peft}, differ by at most": _rounded(same, ".1e"),
    }
    return [f"{what:52}{value:>10}" for what, value in lines.items() if value]


def _cells(of: Measured, tokens: int) -> list[str]:
    program = of.program
    return [
        f"{of.step_seconds * 1e3:,.0f}",
        f"{tokens / of.step_seconds:,.0f}",
        f"{STEPS * of.step_seconds / 60:,.1f}",
        _scaled(program.compile_seconds, 1, ".1f"),
        _scaled(program.flops, 1e9, ",.1f"),
        _scaled(program.planned_bytes, 1e6, ",.0f"),
        _scaled(of.peak_bytes, 1e6, ",.0f"),
    ]


def _scaled(value: float | None, unit: float, form: str) -> str:
    return "" if value is None else format(value / unit, form)


def _rounded(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
