"""The tables of `benchmark.py train`, for a terminal of 80 columns."""

import importlib.metadata
import statistics
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from gpt2_jax.benchmarks.report import plain_table
from gpt2_jax.benchmarks.step_contest import COMPARED_STEPS
from gpt2_jax.benchmarks.train import TrainFigures
from gpt2_jax.benchmarks.train_load import TITLES, Contestant

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers")

LEGEND = """\
ours / it  how many times as fast ours is, the median of the rounds' own ratios
of matmul  operations that the model needs, as a share of what large matrix
           products in the same dtype reached just before each round
MFU        the same, as a share of the vendor's figure for the device
compile s  to trace and compile, in a process that starts afresh; for PyTorch
           what the first step takes more than the second
peak MB    the most held beyond libraries and compiler, told by the system
"""


def print_train(console: Console, measured: Sequence[TrainFigures]) -> None:
    """A table for each dtype, what it says in a few lines, and who was left out."""
    for figures in measured:
        console.print(step_table(figures))
        for line in (*comparisons(figures), ""):
            console.print(line, markup=False, soft_wrap=True)
        for name, reason in figures.left_out.items():
            console.print(f"{TITLES[name]} is left out: {reason}", markup=False, soft_wrap=True)
    for line in best_of_all(measured):
        console.print(line, markup=False, soft_wrap=True)
    console.print(LEGEND, end="", markup=False, soft_wrap=True)


def step_table(figures: TrainFigures) -> Table:
    """One row for each contestant; `LEGEND` explains the columns."""
    data, peak = figures.settings.data, figures.peaks[0]
    passes = data.batch_size // data.micro_batch_size
    table = plain_table(
        f"{figures.settings.dtype}: {data.batch_size} sequences of {data.sequence_length} "
        f"tokens a step, {passes} pass{'es' * (passes > 1)}",
        f"matrix products reach {_matmul_rate(figures) / 1e9:,.0f} GFLOP/s on {peak.device_kind}",
    )
    table.add_column("", no_wrap=True)
    headings = ("step\nms", "\ntokens/s", "ours\n/ it", "of\nmatmul", "\nMFU", "compile\ns")
    for heading in (*headings, "peak\nMB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, of in figures.measured.items():
        elsewhere = of.program.device != peak.platform
        table.add_row(
            TITLES[name] + f", {of.program.device}" * elsewhere,
            f"{of.step_seconds * 1e3:,.0f}",
            f"{figures.tokens_per_second(name):,.0f}",
            "" if name == "ours" else _formatted(figures.faster(name), ".2f"),
            _formatted(figures.share_of_matmul(name), ".1%"),
            _formatted(figures.mfu(name), ".1%"),
            _formatted(of.program.compile_seconds, ",.1f"),
            _formatted(None if of.peak_bytes is None else of.peak_bytes / 1e6, ",.0f"),
        )
    return table


def comparisons(figures: TrainFigures) -> list[str]:
    """Ours against the best of PyTorch and against plain Flax, a line for each that worked."""
    lines: dict[str, str] = {}
    best = figures.best_pytorch
    if best is not None:
        lines["best of PyTorch"] = f"{TITLES[best]}, {figures.tokens_per_second(best):,.0f}"
        lines[f"speed, {TITLES['ours']} / {TITLES[best]}"] = f"{figures.faster(best):.3f}"
    if "plain" in figures.measured:
        lines[f"speed, {TITLES['ours']} / {TITLES['plain']}"] = f"{figures.faster('plain'):.3f}"
    differences = [figures.loss_difference(name) for name in figures.measured if name != "ours"]
    known = [difference for difference in differences if difference is not None]
    if known:
        lines[f"losses of {COMPARED_STEPS} steps differ from ours by at most"] = f"{max(known):.1e}"
    return [f"{what:46}{value:>32}" for what, value in lines.items()]


def best_of_all(measured: Sequence[TrainFigures]) -> list[str]:
    """Our best dtype against the best of PyTorch in any; from medians, as no round has both."""
    ours = max(measured, key=lambda figures: figures.tokens_per_second("ours"))
    rivals: list[tuple[float, Contestant, TrainFigures]] = [
        (figures.tokens_per_second(figures.best_pytorch), figures.best_pytorch, figures)
        for figures in measured
        if figures.best_pytorch is not None
    ]
    if len(measured) < 2 or not rivals:
        return []
    speed, name, figures = max(rivals, key=lambda rival: rival[0])
    ratio = ours.tokens_per_second("ours") / speed
    pair = f"{TITLES['ours']} {ours.settings.dtype} / {TITLES[name]} {figures.settings.dtype}"
    return [f"{f'speed, {pair}':68}{ratio:>10.3f}", ""]


def versions() -> dict[str, str | None]:
    """What is installed of the packages that take part."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _matmul_rate(figures: TrainFigures) -> float:
    """The median round's."""
    return statistics.median(peak.flops for peak in figures.peaks)


def _formatted(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
