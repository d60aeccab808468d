"""The picture of `benchmark.py train`: a bar for each contestant and dtype."""

from collections.abc import Sequence
from pathlib import Path

from gpt2_jax.benchmarks.train import TrainFigures
from gpt2_jax.benchmarks.train_load import TITLES
from gpt2_jax.files import written_beside

_OURS, _OTHERS = "tab:blue", "silver"


def plot_train(measured: Sequence[TrainFigures], path: Path, model: str) -> None:
    """Draws tokens per second as horizontal bars, the fastest of each dtype on top, as a PNG.

    Args:
      measured: one for each dtype.
      path: where to.
      model: what is trained.
    """
    # Figure's own canvas draws to files: no pyplot, no window, no global state.
    from matplotlib.figure import Figure

    rows = sum(len(figures.measured) for figures in measured)
    figure = Figure(figsize=(8, 1.2 + 0.4 * rows + 0.4 * len(measured)), layout="constrained")
    heights = [len(figures.measured) for figures in measured]
    panels = figure.subplots(
        len(measured), sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )[:, 0]
    for axes, figures in zip(panels, measured, strict=True):
        names = sorted(figures.measured, key=figures.tokens_per_second)
        bars = axes.barh(
            [TITLES[name] for name in names],
            [figures.tokens_per_second(name) for name in names],
            color=[_OURS if name == "ours" else _OTHERS for name in names],
        )
        axes.bar_label(bars, fmt="{:,.0f}", padding=3)
        axes.set_ylabel(figures.settings.dtype)
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("tokens per second")
    data, device = measured[0].settings.data, measured[0].peaks[0].device_kind
    tokens = f"{data.batch_size} x {data.sequence_length} tokens a step"
    title = f"Training {model}, {tokens}, on {device}"
    figure.suptitle(title, parse_math=False)  # a file may be named with two "$"
    with written_beside(path) as scratch:
        figure.savefig(scratch, format="png", dpi=120)
