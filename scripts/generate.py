"""Continues prompts: python scripts/generate.py --model gpt2 --prompt "Hello, my name is"."""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import tyro

from gpt2_jax.cli import (
    check_given_once,
    check_writable_place,
    given_flags,
    keep_compiled_programs,
    parse_flags,
    print_error,
    run,
)
from gpt2_jax.config import GPT2Config, check_positive_int
from gpt2_jax.errors import UserError
from gpt2_jax.generation.presentation import (
    note_limits,
    print_heading,
    print_table,
    write_samples_page,
)
from gpt2_jax.generation.prompts import converse, gather
from gpt2_jax.generation.samples import Sample, in_order, next_row, write_growing
from gpt2_jax.generation.text_stream import Notation, speaks_gpt2

if TYPE_CHECKING:
    from gpt2_jax.generation.sampling import Sampling
    from gpt2_jax.lora import Lora, LoraSettings
    from gpt2_jax.packed import PackedParams

Variant = tuple[str | None, Callable[[], "PackedParams"]]
"""An adapter's directory, None for the base alone, and the parameters with it merged."""


@dataclasses.dataclass(frozen=True)
class Flags:
    """Generates text with a GPT-2. The text goes to stdout as it is made, all else to stderr.

    Without --prompt, --prompt_file and --interactive, what is piped in is the prompt.
    Several samples come one after another; on a terminal a line divides them.
    """

    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """text to continue; may be given again, for several prompts"""
    prompt_file: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """UTF-8 file that is one prompt, all but a last newline; - is stdin; may be given again"""
    interactive: bool = False
    """ask for one prompt after another, each a line; Ctrl-D ends, Ctrl-C stops a text"""
    source: str = "pretrained"
    """pretrained, a run directory of train.py, or a Hugging Face model directory"""
    model: str | None = None
    """pretrained size: gpt2 (the default), gpt2-medium, gpt2-large or gpt2-xl"""
    weights: str | None = None
    """pretrained weights from here, not the hub: a .pt or .safetensors file, or a directory"""
    revision: str | None = None
    """branch, tag or commit of the pretrained model on the hub"""
    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """directory of a LoRA adapter for the model; given again, each one's texts in turn"""
    precision: Literal["f32", "bf16", "int8"] = "f32"
    """of weights and arithmetic; int8 and bf16 are faster, f32 is exact"""
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
    min_p: float | None = None
    """draw from tokens at least this many times as probable as the likeliest only"""
    repetition_penalty: float = 1.0
    """above 1 makes tokens that the text already has less likely"""
    seed: int = 0
    """of the draws: the same seed gives the same text"""
    overflow: Literal["stop", "slide"] = "stop"
    """where the context is full: stop, or forget all but the last half of it and go on"""
    explain: bool = False
    """after each text, a table on stderr: every new token's probability and likeliest rivals"""
    html: Path | None = None
    """write the same as a page for a browser, to this file"""
    alternatives: int = 5
    """how many of the likeliest tokens --explain and --html show; --json if this is given"""
    json: bool = False
    """one JSON object a line, for each sample: lora, prompt, text, tokens, logprobs and more"""
    ids: bool = False
    """prompts and texts are token ids, "15496 11"; always so if the vocabulary is not GPT-2's"""
    allow_end_of_text: bool = False
    """let <|endoftext|> in the prompt be that token instead of plain characters"""


# What a flag makes meaningless, and why.
_CONFLICTS = {
    "greedy": (
        ("temperature", "top_k", "top_p", "min_p"),
        "the likeliest token is taken and none is drawn",
    ),
    "interactive": (("prompt", "prompt_file", "html"), "prompts are typed, one after another"),
    "json": (("explain",), "the output is for programs; --alternatives K adds to it"),
    "ids": (("allow_end_of_text",), "50256 is <|endoftext|> as it is"),
}


class _Model(NamedTuple):
    """What stays the same from prompt to prompt."""

    variants: Sequence[Variant]
    """what answers each prompt, in turn"""
    config: GPT2Config
    sampling: "Sampling"
    notation: Notation
    alternatives: int
    """how many of the likeliest tokens to tell of at each place"""


def main() -> None:
    """Checks the flags, loads the model, prints the samples."""
    flags, given = parse_flags(Flags), given_flags()
    _check(flags, given)
    texts = [] if flags.interactive else gather(flags.prompt, flags.prompt_file)
    if sys.stdout is None:
        raise UserError("standard output is closed; give the text somewhere to go")
    sys.stdout.reconfigure(errors="replace")  # characters that the terminal's encoding lacks

    # Only now the slow imports, so that --help and mistakes answer at once.
    from gpt2_jax.generation.sampling import Sampling

    temperature = 0.0 if flags.greedy else flags.temperature
    sampling = Sampling(
        temperature, flags.top_k, flags.top_p, flags.min_p, flags.repetition_penalty
    )
    keep_compiled_programs()
    variants, config = _load(flags, rows=max(1, len(texts)) * flags.num_samples)
    notation = Notation(ids=flags.ids or not speaks_gpt2(config))
    shows_alternatives = flags.explain or flags.html or "alternatives" in given
    alternatives = min(flags.alternatives, config.vocab_size) if shows_alternatives else 0
    model = _Model(variants, config, sampling, notation, alternatives)
    if flags.interactive:
        converse(lambda index, line: _answer([line], model, flags, index), print_error)
    else:
        _answer(texts, model, flags)


def _check(flags: Flags, given: set[str]) -> None:
    """Raises UserError for flags out of range, and for those that contradict each other."""
    for name in ("max_new_tokens", "num_samples", "alternatives"):
        check_positive_int(name, getattr(flags, name))
    if not 0 <= flags.seed < 2**32:
        raise UserError(f"seed={flags.seed} must be in [0, 2^32)")
    for name, (others, why) in _CONFLICTS.items():
        for other in others:
            if getattr(flags, name) and other in given:
                raise UserError(f"--{other} does not go with --{name}: {why}; drop one of them")
    if flags.num_samples > 1 and (flags.greedy or flags.temperature == 0):
        raise UserError(
            f"num_samples={flags.num_samples} would all be the same text without chance; "
            f"ask for 1, or leave out --greedy and --temperature 0"
        )
    if "alternatives" in given and not (flags.explain or flags.html or flags.json):
        raise UserError("--alternatives goes with --explain, --html or --json; add one of them")
    check_given_once("lora", [Path(directory) for directory in flags.lora])
    if flags.html is not None:
        check_writable_place(flags.html)


def _load(flags: Flags, rows: int) -> tuple[list[Variant], GPT2Config]:
    """The base with every adapter, packed for `rows` texts at once, and the configuration."""
    from gpt2_jax.lora import merge
    from gpt2_jax.packed import pack
    from gpt2_jax.sources import load_with_adapters

    params, config, adapters = load_with_adapters(
        flags.source,
        [Path(directory) for directory in flags.lora],
        model=flags.model,
        weights=flags.weights,
        revision=flags.revision,
    )
    packed = functools.partial(pack, precision=flags.precision, rows=rows)
    if len(adapters) > 1:
        # Merged anew for every use, so that only one at a time lies in memory beside the base.
        def merged(adapter: "tuple[Lora, LoraSettings]") -> "PackedParams":
            return packed(merge(params, *adapter))

        each = [functools.partial(merged, adapter) for adapter in adapters]
        return list(zip(flags.lora, each, strict=True)), config
    # One name, or what it was made of would take memory too.
    if adapters:
        params = merge(params, *adapters[0])
    params = packed(params)
    return [(next(iter(flags.lora), None), lambda: params)], config


def _answer(texts: Sequence[str], model: _Model, flags: Flags, first: int = 0) -> None:
    """Prints the samples of some prompts, the first of which has the index `first`."""
    from gpt2_jax.generation.decode import check_prompt

    prompts = [
        model.notation.encode(text, allow_end_of_text=flags.allow_end_of_text) for text in texts
    ]
    for prompt in prompts:
        check_prompt(prompt, model.config)
    if flags.overflow == "stop":
        note_limits(prompts, model.config, flags.max_new_tokens)
    samples: list[Sample] = []
    for lora, params in model.variants:
        if len(model.variants) > 1 and not flags.json:
            print_heading(lora, tables=flags.explain)
        samples += _continue(prompts, params(), lora, model, flags, first)
    if flags.html is not None:
        write_samples_page(flags.html, samples, flags.lora, model.notation)


def _continue(
    prompts: Sequence[Sequence[int]],
    params: "PackedParams",
    lora: str | None,
    model: _Model,
    flags: Flags,
    first: int,
) -> list[Sample]:
    """Prints the samples of `_answer` for one adapter, and returns them."""
    from gpt2_jax.generation.decode import stream

    rows = [prompt for prompt in prompts for _ in range(flags.num_samples)]
    new_tokens = in_order(
        stream(
            params,
            model.config,
            rows,
            max_new_tokens=flags.max_new_tokens,
            sampling=model.sampling,
            seed=flags.seed,
            overflow=flags.overflow,
            alternatives=model.alternatives,
        )
    )
    samples = []
    for index, prompt in enumerate(rows):
        row = next_row(new_tokens)
        if index and not flags.json and sys.stdout.isatty():
            print("-" * 40)
        new = list(row) if flags.json else write_growing(sys.stdout, prompt, row, model.notation)
        prompt_index, sample_index = divmod(index, flags.num_samples)
        samples.append(Sample(first + prompt_index, sample_index, prompt, new))
        if flags.json:
            print(json.dumps({"lora": lora, **samples[-1].to_json(model.notation)}), flush=True)
        if flags.explain:
            print_table(samples[-1], model.notation)
    return samples


if __name__ == "__main__":
    run(main)
