"""Measures speed and memory: python scripts/benchmark.py train."""

import dataclasses
import functools
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpt2_jax import tokenizer
from gpt2_jax.benchmarks.flags import Generate, HellaSwag, Loop, Lora, Memory, Rounding, Train
from gpt2_jax.benchmarks.worker import cpu_cores
from gpt2_jax.cli import check_writable_place, parse_flags, parse_flags_over_config, run
from gpt2_jax.errors import UserError
from gpt2_jax.evaluation.hellaswag_items import FIELDS, read_items, validation_file
from gpt2_jax.files import read_text, write_text
from gpt2_jax.training.config_files import load_config_file

OVERVIEW = """\
What to measure comes first; each has flags of its own, which --help after it lists:

  benchmark.py train     time of a training step, against plain Flax and PyTorch
  benchmark.py loop      tokens per second of the training loop against the bare jitted step
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
    if what not in MEASUREMENTS:
        raise UserError(f"{what!r} cannot be measured; give one of {', '.join(MEASUREMENTS)}")
    flags_type, measure = MEASUREMENTS[what]
    if flags_type in (Loop, Memory):
        flags = parse_flags_over_config(flags_type, load_config_file)
    else:
        flags = parse_flags(flags_type)
    if flags.output is not None:
        check_writable_place(flags.output)
    figures = measure(flags)
    if flags.output is not None:
        write_text(flags.output, json.dumps(figures, indent=2) + "\n")


# The slow imports come once the flags are read, so that --help and mistakes answer at once.


def _train(flags: Train) -> dict[str, Any]:
    threads = flags.threads or cpu_cores()
    if flags.plot is not None:
        check_writable_place(flags.plot)
    from rich.console import Console

    from gpt2_jax.benchmarks.train import measure_train
    from gpt2_jax.benchmarks.train_chart import plot_train
    from gpt2_jax.benchmarks.train_report import print_train, versions

    measure = functools.partial(measure_train, keep_memory=flags.keep_memory)
    measured = _each_dtype(flags, measure, flags.peers)
    console, load = Console(highlight=False), flags.load
    rounds = f"medians of {flags.rounds} rounds of {flags.steps} steps"
    rounds += f", memory kept by {flags.keep_memory}"
    console.print(f"{load.model}, {threads} threads, {rounds}\n", markup=False, soft_wrap=True)
    print_train(console, measured)
    if flags.plot is not None:
        plot_train(measured, flags.plot, load.model)
    return {
        **dataclasses.asdict(load),
        **{"steps": flags.steps, "rounds": flags.rounds, "threads": threads},
        "keep_memory": flags.keep_memory,
        **{"device": measured[0].peaks[0].device_kind, "versions": versions()},
        "measured": [figures.to_json() for figures in measured],
    }


def _each_dtype(
    flags: Train | Lora, measure: Callable[..., Any], names: Sequence[str]
) -> list[Any]:
    """Figures of a contest for each dtype, one after another."""
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        return [
            measure(
                list(dict.fromkeys(names)),
                flags.load.settings(dtype),
                steps=flags.steps,
                rounds=flags.rounds,
                threads=flags.threads or cpu_cores(),
                report=status.update,
            )
            for dtype in dict.fromkeys(flags.dtype)
        ]


def _loop(flags: Loop) -> dict[str, Any]:
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


def _generate(flags: Generate) -> dict[str, Any]:
    threads = flags.threads or cpu_cores()
    from rich.console import Console

    from gpt2_jax.benchmarks.figures import Load
    from gpt2_jax.benchmarks.generation import measure_generation
    from gpt2_jax.benchmarks.model_files import weights_text
    from gpt2_jax.benchmarks.report import print_generation

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
    console, weights = Console(highlight=False), weights_text(flags.source, flags.model)
    console.print(f"{weights}, {threads} threads, medians of {flags.rounds} rounds\n")
    print_generation(console, figures)
    return {"rounds": flags.rounds, "threads": threads, **figures.to_json()}


def _lora(flags: Lora) -> dict[str, Any]:
    threads = flags.threads or cpu_cores()
    from rich.console import Console

    from gpt2_jax.benchmarks.lora import measure_lora
    from gpt2_jax.benchmarks.lora_report import print_lora

    measured = _each_dtype(flags, measure_lora, flags.contestants)
    console = Console(highlight=False)
    load, adapter = flags.load, f"rank {flags.load.rank} on {', '.join(flags.load.targets)}"
    rounds = f"medians of {flags.rounds} rounds of {flags.steps} steps"
    console.print(f"{load.model}, {adapter}, {threads} threads, {rounds}\n", soft_wrap=True)
    print_lora(console, measured)
    return {
        **dataclasses.asdict(load),
        **{"steps": flags.steps, "rounds": flags.rounds, "threads": threads},
        "measured": [figures.to_json() for figures in measured],
    }


def _hellaswag(flags: HellaSwag) -> dict[str, Any]:
    threads = flags.threads or cpu_cores()
    data = validation_file() if flags.data is None else flags.data
    items = read_items(data, fields=FIELDS["lm-evaluation-harness"])
    chosen = items[:: max(1, len(items) // flags.items)][: flags.items]

    from rich.console import Console

    from gpt2_jax.benchmarks.hellaswag import measure_hellaswag, padding
    from gpt2_jax.benchmarks.hellaswag_report import padding_lines, print_hellaswag
    from gpt2_jax.benchmarks.model_files import weights_text

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
    console, weights = Console(highlight=False), weights_text(flags.source, flags.model)
    rounds = f"medians of {flags.rounds} rounds of {len(chosen):,} items"
    console.print(f"{weights}, {threads} threads, {rounds}\n", soft_wrap=True)
    print_hellaswag(console, measured)
    counted = padding(items, n_positions=1024, batch_size=4)
    console.print(f"{data}, {len(items):,} items in batches of 4", markup=False, soft_wrap=True)
    console.print(*padding_lines(counted), sep="\n", markup=False, soft_wrap=True)
    return {
        **{"data": str(data), "items": len(chosen), "weights": weights, "rounds": flags.rounds},
        **{"threads": threads, "measured": [figures.to_json() for figures in measured]},
        "tokens": dataclasses.asdict(counted),
    }


def _rounding(flags: Rounding) -> dict[str, Any]:
    text = read_text(flags.text)
    tokens = tokenizer.encode(text[round(len(text) * (1 - flags.last)) :])

    from gpt2_jax.benchmarks.rounding import rounding_cost
    from gpt2_jax.benchmarks.rounding_report import cost_lines
    from gpt2_jax.sources import load_source

    params, config = load_source(flags.source)
    if config.vocab_size < tokenizer.VOCAB_SIZE:
        raise UserError(f"{flags.source} has another vocabulary than GPT-2's, which the text needs")
    costs = rounding_cost(params, config, tokens, flags.tokens)
    print(f"{flags.source} on {costs['f32']['tokens']:,} tokens of {flags.text}")
    print(*cost_lines(costs), sep="\n")
    return {"device": _device(), "source": flags.source, "text": str(flags.text), **costs}


MEASUREMENTS: dict[str, tuple[type, Callable[[Any], dict[str, Any]]]] = {
    "train": (Train, _train),
    "loop": (Loop, _loop),
    "memory": (Memory, _memory),
    "generate": (Generate, _generate),
    "lora": (Lora, _lora),
    "hellaswag": (HellaSwag, _hellaswag),
    "rounding": (Rounding, _rounding),
}


if __name__ == "__main__":
    run(main)
