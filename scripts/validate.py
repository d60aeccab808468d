"""Proves a GPT-2 equal in JAX and PyTorch: python scripts/validate.py --random_init --layers."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2_jax.cli import parse_flags, run
from gpt2_jax.config import SIZES, config_for_size
from gpt2_jax.errors import UserError

if TYPE_CHECKING:
    from parity.models import Models
    from parity.validation import Validation


@dataclasses.dataclass(frozen=True)
class Flags:
    """Compares JAX with Hugging Face and with the reference: weights, logits, loss, greedy text.

    --layers adds every activation on the way, --training gradients, optimizer and a training run.
    Exits with 0 if all agree, with 1 if something differs.
    """

    source: str = "pretrained"
    """pretrained, a size, a run directory of train.py, or a Hugging Face model directory"""
    model: str | None = None
    """pretrained size: gpt2 (the default), gpt2-medium, gpt2-large or gpt2-xl"""
    weights: str | None = None
    """pretrained weights from here, not the hub: a .pt or .safetensors file, or a directory"""
    revision: str | None = None
    """branch, tag or commit of the model on the hub"""
    random_init: bool = False
    """use random weights, drawn by Hugging Face; needs no weights at hand"""
    prompt: str = "The quick brown fox"
    """text whose logits, loss and activations are compared"""
    gen_prompt: str = "Hello, my name is"
    """text that is continued greedily"""
    max_new_tokens: int = 50
    """length of the continuation, in tokens"""
    layers: bool = False
    """compare every layer's activations and name the first place that differs"""
    training: bool = False
    """compare gradients, optimizer steps and a training run"""
    steps: int = 100
    """length of the training run, with --training"""
    report: Path | None = None
    """with --layers, also write all of it to this HTML file"""
    plot: Path | None = None
    """with --training, draw both runs' losses and their difference to this PNG file"""


def main() -> int:
    """Runs the comparisons and prints the table; returns the exit status."""
    flags = parse_flags(Flags)
    _check(flags)

    # Only now the slow imports, so that --help and mistakes answer at once.
    import transformers

    from parity.validation import make_prompts, validate

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    models = _load(flags)
    prompts, speaks = make_prompts(flags.prompt, flags.gen_prompt, models.config)
    if not speaks:
        print(
            f"note: a vocabulary of {models.config.vocab_size} is not GPT-2's; the prompts are "
            f"random tokens",
            file=sys.stderr,
        )
    found = validate(
        models,
        prompts,
        title=_title(flags),
        max_new_tokens=flags.max_new_tokens,
        layers=flags.layers,
        training_steps=flags.steps if flags.training else 0,
    )
    _print(found)
    _write(flags, found)
    return 0 if all(check.passed for check in found.checks) else 1


def _check(flags: Flags) -> None:
    local = flags.source not in ("pretrained", *SIZES)
    if flags.random_init and (flags.weights or flags.revision or local):
        raise UserError("--random_init goes without --source, --weights and --revision; drop one")
    if flags.random_init and flags.source in SIZES and flags.model is not None:
        raise UserError(f"--model {flags.model} goes without --source {flags.source}; drop one")
    if flags.report is not None and not flags.layers:
        raise UserError("--report shows the layers; add --layers, or drop it")
    if flags.plot is not None and not flags.training:
        raise UserError("--plot shows the training; add --training, or drop it")
    for name in ("max_new_tokens", "steps"):
        if getattr(flags, name) < 1:
            raise UserError(f"{name}={getattr(flags, name)} must be at least 1")
    for path in (flags.report, flags.plot):
        # Told before minutes of work are lost.
        if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
            raise UserError(f"cannot write {path}; give a file in a directory that can be written")
    if flags.model is not None:
        config_for_size(flags.model)


def _load(flags: Flags) -> "Models":
    from gpt2_jax.sources import find_source, load_source
    from parity.models import pretrained_models, random_models, trained_models

    if flags.random_init:
        return random_models(config_for_size(_size(flags)))
    place = find_source(
        flags.source, model=flags.model, weights=flags.weights, revision=flags.revision
    )
    if place.is_run:
        return trained_models(*load_source(flags.source))
    return pretrained_models(place.name, place.config, flags.revision)


def _size(flags: Flags) -> str:
    return flags.source if flags.source in SIZES else flags.model or "gpt2"


def _title(flags: Flags) -> str:
    if flags.random_init:
        return f"{_size(flags)}, random weights"
    if flags.source != "pretrained":
        return flags.source
    return flags.weights or _size(flags)


def _print(found: "Validation") -> None:
    from rich.console import Console

    from parity.outcomes import table_of

    console = Console(width=None if sys.stdout.isatty() else 170)
    for table in found.layer_tables():
        console.print(table)
    console.print(table_of(found.checks, f"JAX against PyTorch: {found.title}"))
    for check in found.checks:
        for detail in check.details:
            console.print(f"{check.name}: {detail}", soft_wrap=True, highlight=False)


def _write(flags: Flags, found: "Validation") -> None:
    from parity.report import write_report
    from parity.trajectory import plot_trajectory

    if flags.report is not None:
        write_report(flags.report, found.report())
        print(f"wrote {flags.report}", file=sys.stderr)
    if flags.plot is not None and found.curves is not None:
        plot_trajectory(*found.curves, flags.plot, found.title)
        print(f"wrote {flags.plot}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
