"""loss.png: the loss curves, drawn from metrics.jsonl."""

import time
from pathlib import Path

from gpt2_jax.files import written_beside
from gpt2_jax.lora_settings import adapter_parameter_count
from gpt2_jax.training.distributed import is_primary
from gpt2_jax.training.metrics import Record, read_metrics
from gpt2_jax.training.settings import TrainSettings

SECONDS = 60.0
"""A run under way is drawn anew after that long, at its next checkpoint."""


class LossPlot:
    """The picture of a run; a context that draws it at the end, however the run ends."""

    def __init__(self, settings: TrainSettings) -> None:
        self._settings = settings
        self._drawn = time.monotonic()

    def __enter__(self) -> "LossPlot":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._draw()
        except OSError:
            if kind is None:
                raise  # else what ended the run is what the user must read

    def draw_now_and_then(self) -> None:
        """Draws it if that was not done lately."""
        if time.monotonic() - self._drawn > SECONDS:
            self._draw()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        run_dir = Path(self._settings.run_dir)
        if is_primary():
            plot_losses(
                read_metrics(run_dir / "metrics.jsonl"),
                run_dir / "loss.png",
                f"{run_dir.name}: {_size(self._settings)}",
                self._settings.validation.reference_loss,
            )


def _size(settings: TrainSettings) -> str:
    size = f"{settings.model.parameter_count:,} parameters"
    if settings.lora is None:
        return size
    return f"{adapter_parameter_count(settings.model, settings.lora):,} trained beside {size}"


def plot_losses(
    records: list[Record], path: Path, title: str, reference_loss: float | None = None
) -> None:
    """Draws the training and validation loss over steps as a PNG.

    Args:
      records: from `read_metrics`.
      path: where to.
      title: above the curves.
      reference_loss: validation loss of OpenAI's GPT-2, drawn as a line.
    """
    # Figure's own canvas draws to files: no pyplot, no window, no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, label, style in (
        ("loss", "training", {"linewidth": 0.8, "alpha": 0.7}),
        ("val_loss", "validation", {"marker": "o", "markersize": 4, "linewidth": 2}),
    ):
        curve = [(r["step"], r[name]) for r in records if r.get(name) is not None]
        if curve:
            steps, losses = zip(*curve, strict=True)
            axes.plot(steps, losses, label=f"{label}, last {losses[-1]:.3f}", **style)
    if reference_loss is not None:
        label = f"OpenAI's GPT-2, {reference_loss:.3f}"
        axes.axhline(reference_loss, color="gray", linestyle="--", label=label)
    axes.set(xlabel="step", ylabel="cross-entropy, nats per token")
    axes.set_title(title, parse_math=False)  # a run may be named with two "$"
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend()
    with written_beside(path) as scratch:
        figure.savefig(scratch, format="png", dpi=120)
