"""Measures speed and memory: python scripts/benchmark.py train --config configs/demo.py."""

import dataclasses
import json
import signal
import sys
from pathlib import Path
from typing import Any

from gpt2_jax import tokenizer
from gpt2_jax.benchmarks.flags import Generate, HellaSwag, Lora, Memory, Rounding, Train
from gpt2_jax.benchmarks.hellaswag_scorers import TITLES as SCORERS
from gpt2_jax.benchmarks.lora_load import TITLES
from gpt2_jax.cli import parse_flags, parse_flags_over_config, run
from gpt2_jax.config import check_positive_int
from gpt2_jax.errors import UserError
from gpt2_jax.evaluation.hellaswag_items import FIELDS, read_items, validation_file
from gpt2_jax.files import read_text, write_text
from gpt2_jax.training.config_files import load_config_file

OVERVIEW = """\
What to measure comes first; each has flags of its own, which --help after it lists:

  benchmark.py train     tokens per second of the training loop against the bare jitted step
  benchmark.py memory    what the compiled training step asks of each device
  benchmark.py generate  speed of generation, against whatever else is installed
  benchmark.py lora      time of a LoRA step, against training all weights and against PEFT
  benchmark.py hellaswag speed of scoring, against PyTorch and lm-evaluation-harness
  benchmark.py rounding  what weights of fewer bits cost in perplexity
"""


def main() -> None:
    """Measures and prints."""
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(OVERVIEW, end="")
        return
    what = sys.argv[1] if sys.argv[1:] and not sys.argv[1].startswith("-") else "train"
    flags: Train | Memory | Generate | Lora | HellaSwag | Rounding
    match what:
        case "train":
            flags = parse_flags_over_config(Train, load_config_file)
            figures = _train(flags)
        case "memory":
            flags = parse_flags_over_config(Memory, load_config_file)
            figures = _memory(flags)
        case "generate":
            flags = parse_flags(Generate)
            figures = _generate(flags)
        case "lora":
            flags = parse_flags(Lora)
            figures = _lora(flags)
        case "hellaswag":
            flags = parse_flags(HellaSwag)
            figures = _hellaswag(flags)
        case "rounding":
            flags = parse_flags(Rounding)
            figures = _rounding(flags)
        case _:
            known = "train, memory, generate, lora, hellaswag or rounding"
            raise UserError(f"{what!r} cannot be measured; give {known}")
    if flags.output is not None:
        try:
            write_text(flags.output, json.dumps(figures, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {flags.output}: {error.strerror}") from None


# The slow imports come once the flags are read, so that --help and mistakes answer at once.


def _train(flags: Train) -> dict[str, Any]:
    for name in ("measured_steps", "rounds"):
        check_positive_int(name, getattr(flags, name))
    from gpt2_jax.benchmarks.loop import loop_against_step

    figures = loop_against_step(flags.settings, flags.measured_steps, flags.rounds)
    rounds = f"{flags.rounds} rounds of {flags.measured_steps} steps, medians"
    device = _device()
    print(f"{flags.config.name} on {device}, {rounds}")
    print(f"bare step      {figures['step']:12,.0f} tokens/s")
    print(f"training loop  {figures['loop']:12,.0f} tokens/s")
    print(f"loop / step    {figures['ratio']:12.3f}")
    return {"device": device, "config": str(flags.config), **figures}


def _memory(flags: Memory) -> dict[str, Any]:
    from gpt2_jax.benchmarks.memory import step_memory

    figures = step_memory(flags.settings)
    device = _device()
    print(f"{flags.config.name} on {device}, gigabytes of each device")
    for name, size in figures.items():
        print(f"{name:24}{size / 1e9:8.2f}")
    return {"device": device, "config": str(flags.config), **figures}


def _device() -> str:
    import jax

    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def _checked_threads(asked: int | None) -> int:
    from gpt2_jax.benchmarks.worker import cpu_cores

    threads = cpu_cores() if asked is None else asked
    if not 1 <= threads <= cpu_cores():
        raise UserError(f"threads={threads} must be from 1 to {cpu_cores()}, the cores there are")
    return threads


def _generate(flags: Generate) -> dict[str, Any]:
    for name in ("prompt_tokens", "rounds"):
        check_positive_int(name, getattr(flags, name))
    for name in ("engines", "batch"):
        if not getattr(flags, name):
            raise UserError(f"--{name} is empty; give at least one, or leave it out")
    for batch in flags.batch:
        check_positive_int("batch", batch)
    if flags.new_tokens < 2:
        raise UserError(f"new_tokens={flags.new_tokens} must be at least 2, or nothing is decoded")
    threads = _checked_threads(flags.threads)

    from rich.console import Console

    from gpt2_jax.benchmarks.figures import Load
    from gpt2_jax.benchmarks.generation import measure_generation
    from gpt2_jax.benchmarks.report import LEGEND, first_word_table, speed_table

    # Its scratch directory is of gigabytes, and must not stay when `timeout` ends it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with Console(stderr=True).status("starting") as status:
        figures = measure_generation(
            list(dict.fromkeys(flags.engines)),
            [Load(batch, flags.prompt_tokens, flags.new_tokens) for batch in flags.batch],
            rounds=flags.rounds,
            threads=threads,
            source=flags.source,
            model=flags.model,
            script=Path(__file__).with_name("generate.py") if flags.shell else None,
            report=status.update,
        )
    console = Console(highlight=False)
    weights = flags.source or f"{flags.model or 'gpt2'} with random weights"
    console.print(f"{weights}, {threads} threads, medians of {flags.rounds} rounds\n")
    for measured, engines in zip(figures.measured, figures.engines, strict=True):
        console.print(speed_table(measured, engines, figures.elsewhere, figures.config))
    console.print(LEGEND, markup=False, soft_wrap=True)
    if figures.first_words:
        console.print(first_word_table(figures.first_words))
    for name, reason in figures.left_out.items():
        console.print(f"{name} is left out: {reason}", markup=False, soft_wrap=True)
    return {"rounds": flags.rounds, "threads": threads, **figures.to_json()}


def _lora(flags: Lora) -> dict[str, Any]:
    for name in ("steps", "rounds"):
        check_positive_int(name, getattr(flags, name))
    for name in ("contestants", "dtype"):
        if not getattr(flags, name):
            raise UserError(f"--{name} is empty; give at least one, or leave it out")
    threads = _checked_threads(flags.threads)

    from rich.console import Console

    from gpt2_jax.benchmarks.lora import measure_lora
    from gpt2_jax.benchmarks.lora_report import LEGEND, comparisons, step_table

    with Console(stderr=True).status("starting") as status:
        measured = [
            measure_lora(
                list(dict.fromkeys(flags.contestants)),
                flags.load.settings(dtype),
                steps=flags.steps,
                rounds=flags.rounds,
                threads=threads,
                report=status.update,
            )
            for dtype in dict.fromkeys(flags.dtype)
        ]
    console = Console(highlight=False)
    load, adapter = flags.load, f"rank {flags.load.rank} on {', '.join(flags.load.targets)}"
    rounds = f"medians of {flags.rounds} rounds of {flags.steps} steps"
    console.print(f"{load.model}, {adapter}, {threads} threads, {rounds}\n", soft_wrap=True)
    for figures in measured:
        console.print(step_table(figures))
        for line in (*comparisons(figures), ""):
            console.print(line, markup=False, soft_wrap=True)
        for name, reason in figures.left_out.items():
            console.print(f"{TITLES[name]} is left out: {reason}", markup=False, soft_wrap=True)
    console.print(LEGEND, end="", markup=False, soft_wrap=True)
    return {
        **dataclasses.asdict(load),
        **{"steps": flags.steps, "rounds": flags.rounds, "threads": threads},
        "measured": [figures.to_json() for figures in measured],
    }


def _hellaswag(flags: HellaSwag) -> dict[str, Any]:
    for name in ("items", "rounds"):
        check_positive_int(name, getattr(flags, name))
    for name in ("contestants", "dtype", "batch"):
        if not getattr(flags, name):
            raise UserError(f"--{name} is empty; give at least one, or leave it out")
    for batch in flags.batch:
        check_positive_int("batch", batch)
    threads = _checked_threads(flags.threads)
    data = validation_file() if flags.data is None else flags.data
    items = read_items(data, fields=FIELDS["lm-evaluation-harness"])
    chosen = items[:: max(1, len(items) // flags.items)][: flags.items]

    from rich.console import Console

    from gpt2_jax.benchmarks.hellaswag import measure_hellaswag, padding
    from gpt2_jax.benchmarks.hellaswag_report import LEGEND, padding_lines, speed_table

    with Console(stderr=True).status("starting") as status:
        measured = [
            measure_hellaswag(
                list(dict.fromkeys(flags.contestants)),
                chosen,
                source=flags.source,
                model=flags.model,
                dtype=dtype,
                batch_sizes=list(dict.fromkeys(flags.batch)),
                rounds=flags.rounds,
                threads=threads,
                report=status.update,
            )
            for dtype in dict.fromkeys(flags.dtype)
        ]
    console = Console(highlight=False)
    weights = flags.source or f"{flags.model or 'gpt2'} with random weights"
    rounds = f"medians of {flags.rounds} rounds of {len(chosen):,} items"
    console.print(f"{weights}, {threads} threads, {rounds}\n", soft_wrap=True)
    for figures in measured:
        console.print(speed_table(figures))
        for name, reason in figures.left_out.items():
            console.print(f"{SCORERS[name]} is left out: {reason}", markup=False, soft_wrap=True)
    console.print(LEGEND, markup=False, soft_wrap=True)
    counted = padding(items, n_positions=1024, batch_size=4)
    console.print(f"{data}, {len(items):,} items in batches of 4", markup=False, soft_wrap=True)
    for line in padding_lines(counted):
        console.print(line, markup=False, soft_wrap=True)
    return {
        **{"data": str(data), "items": len(chosen), "weights": weights, "rounds": flags.rounds},
        **{"threads": threads, "measured": [figures.to_json() for figures in measured]},
        "tokens": dataclasses.asdict(counted),
    }


def _rounding(flags: Rounding) -> dict[str, Any]:
    if not 0 < flags.last <= 1:
        raise UserError(f"last={flags.last} must be in (0, 1]; 1 reads the whole text")
    check_positive_int("tokens", flags.tokens)
    text = read_text(flags.text)
    tokens = tokenizer.encode(text[round(len(text) * (1 - flags.last)) :])

    from gpt2_jax.benchmarks.rounding import rounding_cost
    from gpt2_jax.sources import load_source

    params, config = load_source(flags.source)
    if config.vocab_size < tokenizer.VOCAB_SIZE:
        raise UserError(f"{flags.source} has another vocabulary than GPT-2's, which the text needs")
    costs = rounding_cost(params, config, tokens, flags.tokens)
    print(f"{flags.source} on {costs['f32']['tokens']:,} tokens of {flags.text}")
    print("        weights  perplexity  against f32  same likeliest token")
    for precision, cost in costs.items():
        change = cost["perplexity"] / costs["f32"]["perplexity"] - 1
        print(
            f"{precision:5}{cost['megabytes']:7.1f} MB{cost['perplexity']:12.3f}{change:13.3%}"
            f"{cost['agreement']:22.2%}"
        )
    return {"device": _device(), "source": flags.source, "text": str(flags.text), **costs}


if __name__ == "__main__":
    run(main)
