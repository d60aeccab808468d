"""Compares a base with adapters: python scripts/compare_outputs.py --lora DIR --prompt "Hello"."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from gpt2_jax.cli import (
    check_given_once,
    check_writable_place,
    given_flags,
    keep_compiled_programs,
    parse_flags,
    run,
)
from gpt2_jax.config import GPT2Config, check_positive_int
from gpt2_jax.errors import UserError
from gpt2_jax.files import read_text
from gpt2_jax.generation.prompts import gather
from gpt2_jax.generation.text_stream import Notation, speaks_gpt2

if TYPE_CHECKING:
    from gpt2_jax.comparison.side_by_side import Comparison
    from gpt2_jax.data.batches import Windows
    from gpt2_jax.model import Params

SHOWN = 10
"""of the largest changes, each way"""


@dataclasses.dataclass(frozen=True)
class Flags:
    """Compares a GPT-2 with the same GPT-2 and a LoRA adapter, or several, side by side.

    With prompts: what each writes, by the same draws. With --data or --text: loss and perplexity
    on held-out text, and the tokens that gained and lost most. Both can be had at once.
    """

    lora: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """directory of a LoRA adapter for the model; may be given again, for several adapters"""
    source: str = "pretrained"
    """pretrained, a run directory of train.py, or a Hugging Face model directory"""
    model: str | None = None
    """pretrained size: gpt2 (the default), gpt2-medium, gpt2-large or gpt2-xl"""
    weights: str | None = None
    """pretrained weights from here, not the hub: a .pt or .safetensors file, or a directory"""
    revision: str | None = None
    """branch, tag or commit of the pretrained model on the hub"""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """text to continue; may be given again, for several prompts"""
    prompt_file: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """UTF-8 file that is one prompt, all but a last newline; - is stdin; may be given again"""
    max_new_tokens: int = 50
    """longest continuation, in tokens"""
    num_samples: int = 1
    """how many continuations to draw of each prompt"""
    greedy: bool = False
    """always take the likeliest token"""
    temperature: float = 1.0
    """divides the logits before drawing: below 1 bolder, above 1 wilder, 0 is greedy"""
    top_k: int | None = 50
    """draw from this many of the likeliest tokens only; None keeps all"""
    top_p: float | None = None
    """draw from the likeliest tokens that together have this probability only"""
    seed: int = 0
    """of the draws: the same for every model"""
    precision: Literal["f32", "bf16", "int8"] = "f32"
    """of weights and arithmetic when texts are continued; losses are always computed in f32"""
    data: str | None = None
    """score the validation split of this dataset directory, or the last tenth of a text file:
    what finetune_lora.py --text FILE holds out"""
    text: Path | None = None
    """score this UTF-8 file, all of it held out"""
    windows: int = 64
    """how many windows of the held-out text to score, from its beginning"""
    sequence_length: int | None = None
    """tokens of a window; by default 1024, or what the model's context or the text has"""
    html: Path | None = None
    """write the comparison, with every token coloured by its difference, as a page to this file"""
    json: bool = False
    """one JSON object with all figures, instead of tables"""


def main() -> None:
    """Checks the flags, reads the adapters, loads the base, compares, prints."""
    flags = parse_flags(Flags)
    _check(flags, given_flags())
    texts = gather(flags.prompt, flags.prompt_file) if flags.prompt or flags.prompt_file else []
    held_out_text = read_text(flags.text) if flags.text is not None else None
    if sys.stdout is None:
        raise UserError("standard output is closed; give the tables somewhere to go")
    sys.stdout.reconfigure(errors="replace")  # characters that the terminal's encoding lacks

    # Only now the slow imports, so that --help and mistakes answer at once.
    from gpt2_jax.comparison.held_out import score_held_out
    from gpt2_jax.comparison.side_by_side import Comparison, continue_prompts, names_of
    from gpt2_jax.generation.decode import check_prompt
    from gpt2_jax.generation.sampling import Sampling

    temperature = 0.0 if flags.greedy else flags.temperature
    sampling = Sampling(temperature, flags.top_k, flags.top_p)
    keep_compiled_programs()
    models, config = _load(flags)
    notation = Notation(ids=not speaks_gpt2(config))
    prompts = [notation.encode(text) for text in texts]
    for prompt in prompts:
        check_prompt(prompt, config)
    windows = _windows(flags, held_out_text, config, notation)
    held_out = None
    if windows is not None:
        name = f"{flags.data}, validation split" if flags.data is not None else str(flags.text)
        held_out = score_held_out(models, config, name, windows, flags.windows)
    continuations = continue_prompts(
        models,
        config,
        prompts,
        num_samples=flags.num_samples,
        max_new_tokens=flags.max_new_tokens,
        sampling=sampling,
        seed=flags.seed,
        precision=flags.precision,
    )
    _print(flags, Comparison(names_of(flags.lora), notation, held_out, continuations))


def _check(flags: Flags, given: set[str]) -> None:
    """Raises UserError for flags out of range, and for those that contradict each other."""
    for name in ("max_new_tokens", "num_samples", "windows"):
        check_positive_int(name, getattr(flags, name))
    if flags.sequence_length is not None:
        check_positive_int("sequence_length", flags.sequence_length)
    if not 0 <= flags.seed < 2**32:
        raise UserError(f"seed={flags.seed} must be in [0, 2^32)")
    check_given_once("lora", flags.lora)
    if not flags.lora:
        raise UserError("there is no adapter to compare; give --lora DIR")
    if flags.data is not None and flags.text is not None:
        raise UserError("--text does not go with --data: one text is scored; drop one of them")
    if not (flags.prompt or flags.prompt_file or flags.data is not None or flags.text is not None):
        raise UserError("there is nothing to compare on; give --prompt TEXT, --data or --text")
    _check_greedy(flags, given)
    for name in ("windows", "sequence_length"):
        if name in given and flags.data is None and flags.text is None:
            raise UserError(f"--{name} goes with --data or --text; add one of them")
    if flags.html is not None:
        check_writable_place(flags.html)


def _check_greedy(flags: Flags, given: set[str]) -> None:
    for name in ("temperature", "top_k", "top_p"):
        if flags.greedy and name in given:
            raise UserError(
                f"--{name} does not go with --greedy: the likeliest token is taken and none is "
                f"drawn; drop one of them"
            )
    if flags.num_samples > 1 and (flags.greedy or flags.temperature == 0):
        raise UserError(
            f"num_samples={flags.num_samples} would all be the same text without chance; "
            f"ask for 1, or leave out --greedy and --temperature 0"
        )


def _load(flags: Flags) -> "tuple[list[Params], GPT2Config]":
    """The base, and it with each adapter."""
    from gpt2_jax.comparison.held_out import check_dataset
    from gpt2_jax.lora import merge
    from gpt2_jax.sources import load_with_adapters

    if flags.data is not None:
        check_dataset(flags.data)
    base, config, adapters = load_with_adapters(
        flags.source,
        flags.lora,
        model=flags.model,
        weights=flags.weights,
        revision=flags.revision,
    )
    return [base, *(merge(base, *adapter) for adapter in adapters)], config


def _windows(
    flags: Flags, text: str | None, config: GPT2Config, notation: Notation
) -> "Windows | None":
    """The held-out text that was asked for, if any."""
    import numpy as np

    from gpt2_jax.comparison.held_out import windows_of_dataset, windows_of_text

    if flags.data is not None:
        return windows_of_dataset(flags.data, config, flags.sequence_length)
    if text is not None:
        return windows_of_text(np.array(notation.encode(text), int), config, flags.sequence_length)
    return None


def _print(flags: Flags, comparison: "Comparison") -> None:
    """Prints the tables or the JSON object, and writes the page."""
    from gpt2_jax.comparison.page import write_page
    from gpt2_jax.comparison.tables import tables, to_json

    if flags.json:
        print(json.dumps(to_json(comparison, SHOWN)))
    else:
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else 120)
        for table in tables(comparison, SHOWN):
            console.print(table)
    if flags.html is not None:
        write_page(flags.html, comparison, name=_name(flags), facts=_facts(flags), count=SHOWN)
        print(f"wrote {flags.html}", file=sys.stderr)


def _name(flags: Flags) -> str:
    if flags.source != "pretrained":
        return flags.source
    return flags.weights or flags.model or "gpt2"


def _facts(flags: Flags) -> dict[str, str]:
    """What the page says of how it was made."""
    facts = {"adapters": ", ".join(map(str, flags.lora))}
    if flags.prompt or flags.prompt_file:
        rules = {name: getattr(flags, name) for name in ("temperature", "top_k", "top_p")}
        drawn = ", ".join(f"{name} {value}" for name, value in rules.items() if value is not None)
        facts["sampling"] = "greedy" if flags.greedy else f"{drawn}, seed {flags.seed}"
        facts["precision of the texts"] = flags.precision
    return facts


if __name__ == "__main__":
    run(main)
