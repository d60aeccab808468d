"""The run's record: metrics.jsonl, and the loss curves drawn from it.

Lines are JSON objects in order of time, of two kinds. Both speak of the parameters after
`step` updates, so step 0 is the untrained model.

    {"step": 0, "val_loss": 10.83}
    {"step": 0, "loss": 10.84, "grad_norm": 4.1, "learning_rate": 2e-05, "tokens_per_second": 5100}
"""

import json
from pathlib import Path
from typing import Any, TextIO


class MetricsLog:
    """Appends records to metrics.jsonl; each is on disk when `write` returns."""

    def __init__(self, path: Path) -> None:
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Writes one record; values must be finite."""
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics.jsonl, in order."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plot_losses(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draws the training and validation loss over steps as a PNG."""
    # Figure's own canvas draws to files: no pyplot, no window, no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, label, style in (
        ("loss", "training", {"linewidth": 0.8, "alpha": 0.7}),
        ("val_loss", "validation", {"marker": "o", "markersize": 4, "linewidth": 2}),
    ):
        curve = [(record["step"], record[name]) for record in records if name in record]
        if curve:
            steps, losses = zip(*curve, strict=True)
            axes.plot(steps, losses, label=f"{label}, last {losses[-1]:.3f}", **style)
    axes.set(xlabel="step", ylabel="cross-entropy, nats per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    scratch = path.with_name(f".{path.name}")
    figure.savefig(scratch, format="png", dpi=120)
    scratch.replace(path)
