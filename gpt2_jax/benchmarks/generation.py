"""All that `benchmark.py generate` measures, from flags to figures."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gpt2_jax.benchmarks.contest import Contest
from gpt2_jax.benchmarks.engines import EngineName, family, missing_packages, precision, title
from gpt2_jax.benchmarks.figures import EngineFigures, Load, Measured, evaluate
from gpt2_jax.benchmarks.first_word import first_word
from gpt2_jax.benchmarks.model_files import write_model
from gpt2_jax.benchmarks.worker import Worker
from gpt2_jax.config import GPT2Config
from gpt2_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class GenerationFigures:
    """What came of it.

    Attributes:
      config: of the model.
      measured: for each load, what was measured.
      engines: for each load, what it means.
      elsewhere: engines that run on another device than ours, and on which.
      left_out: engines that could not be measured, and why.
      first_words: seconds from the shell to the first word, of every run, by precision.
    """

    config: GPT2Config
    measured: list[Measured]
    engines: list[dict[EngineName, EngineFigures]]
    elsewhere: dict[EngineName, str]
    left_out: dict[str, str]
    first_words: dict[str, list[float]]

    def to_json(self) -> dict[str, Any]:
        """Everything, each single measurement included."""
        return {
            "loads": [
                {
                    **dataclasses.asdict(measured.load),
                    "bandwidth": measured.bandwidth[1],
                    "engines": {
                        name: {
                            **dataclasses.asdict(of),
                            "turns": [turn._asdict() for turn in measured.turns[name]],
                        }
                        for name, of in engines.items()
                    },
                }
                for measured, engines in zip(self.measured, self.engines, strict=True)
            ],
            "elsewhere": self.elsewhere,
            "left_out": self.left_out,
            "first_words": self.first_words,
        }


def measure_generation(
    names: Sequence[EngineName],
    loads: Sequence[Load],
    *,
    rounds: int,
    threads: int,
    source: str | None = None,
    model: str | None = None,
    script: Path | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> GenerationFigures:
    """Measures the engines that are installed, by turns, with one model.

    Args:
      names: the engines.
      loads: what to ask them for.
      rounds: how often each is measured with each load.
      threads: CPU cores for each.
      source: the model, as `load_source` takes it; None for random weights.
      model: the model's size.
      script: scripts/generate.py, to be measured from the shell; None leaves it out.
      report: told what is being done.

    Raises:
      UserError: if there is no such model, its context is too short, or no engine is left.
    """
    missing = {name: missing_packages(name) for name in names}
    left_out = {
        family(name).title: f"not installed; pip install {' '.join(packages)}"
        for name, packages in missing.items()
        if packages
    }
    installed = [name for name in names if not missing[name]]
    if not installed:
        raise UserError(f"no engine is left: {'; '.join(map(': '.join, left_out.items()))}")
    with TemporaryDirectory(prefix="gpt2_jax-benchmark-") as scratch:
        report("writing the model")
        with Worker(threads, device="cpu") as worker:
            files = worker.run(write_model, Path(scratch), source, model)
        for load in loads:
            check_fits(load, files.config)
        with Contest(installed, files, threads, report) as contest:
            measured = [contest.measure(load, rounds) for load in loads]
        first_words = {}
        if script is not None:
            for own in [precision(name) for name in installed if name.startswith("ours")]:
                report(f"{script.name} at {own}: from the shell to the first word")
                cache = Path(scratch) / f"programs-{own}"
                first_words[own] = first_word(script, files, own, cache)
    left_out |= {title(name): complaint for name, complaint in contest.failures.items()}
    return GenerationFigures(
        files.config,
        measured,
        [evaluate(of, files.config) for of in measured],
        {name: on for name, on in contest.devices.items() if on != contest.device},
        left_out,
        first_words,
    )


def check_fits(load: Load, config: GPT2Config) -> None:
    """Raises UserError if the model's context is too short for a load."""
    if load.prompt_tokens + load.new_tokens > config.n_positions:
        raise UserError(
            f"prompt_tokens={load.prompt_tokens} and new_tokens={load.new_tokens} are more than "
            f"the model's context of {config.n_positions}; take fewer"
        )
