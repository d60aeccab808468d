"""Texts as lm-evaluation-harness asks for them: up to a stop string, by named arguments.

Of the harness only the arguments' names are known here; `interop.lm_eval` is its model.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gpt2_jax.config import GPT2Config, check_positive_int, is_number
from gpt2_jax.errors import UserError
from gpt2_jax.generation.decode import stream
from gpt2_jax.generation.sampling import Sampling
from gpt2_jax.generation.text_stream import TextStream
from gpt2_jax.interop.lm_eval_scoring import warn_of_cuts
from gpt2_jax.model import Params
from gpt2_jax.packed import PackedParams
from gpt2_jax.tokenizer import END_OF_TEXT, END_OF_TEXT_ID

# The harness's own name and those of other libraries; the first that is given counts.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_RULES = ("top_k", "top_p", "min_p", "repetition_penalty")
_KNOWN = ("until", *_LENGTHS, "do_sample", "temperature", *_RULES, "num_beams")


class Generation(NamedTuple):
    """What a text shall be."""

    until: tuple[str, ...]
    """it ends before the first of these"""
    max_gen_toks: int
    """and after this many tokens"""
    sampling: Sampling
    """how each is chosen"""


def read_generation(arguments: Mapping[str, Any], max_gen_toks: int) -> Generation:
    """Reads the arguments of a request, "generation_kwargs" in a task's file.

    Without `do_sample`, a temperature above 0 means to sample. What is not given is off: nothing
    but the temperature changes the model's distribution.

    Args:
      arguments: until, max_gen_toks or another library's name for it, do_sample, temperature,
        top_k, top_p, min_p, repetition_penalty; and num_beams, which must be 1.
      max_gen_toks: new tokens where the arguments do not say.

    Raises:
      UserError: if an argument is not known, or its value out of range.
    """
    for name, value in arguments.items():
        if name not in _KNOWN:
            raise UserError(
                f"generation argument {name}={value!r} is not known; use {', '.join(_KNOWN)}"
            )
    given = {name: value for name, value in arguments.items() if value is not None}
    if given.get("num_beams", 1) != 1:
        raise UserError(f"num_beams={given['num_beams']!r}: there is no beam search; give 1")
    length = next((given[name] for name in _LENGTHS if name in given), max_gen_toks)
    check_positive_int("max_gen_toks", length)
    return Generation(_stops(given.get("until", ())), length, _sampling(given))


def _stops(until: object) -> tuple[str, ...]:
    """Stop strings, <|endoftext|> among them; empty ones stop nothing."""
    stops = [until] if isinstance(until, str) else until
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) for stop in stops):
        raise UserError(f"until={until!r} must be a text or a list of texts")
    return tuple(dict.fromkeys(stop for stop in [*stops, END_OF_TEXT] if stop))


def _sampling(given: Mapping[str, Any]) -> Sampling:
    temperature = given.get("temperature", 0.0)
    if not is_number(temperature):
        raise UserError(f"temperature={temperature!r} must be a number; 0 is greedy")
    do_sample = given.get("do_sample", temperature > 0)
    if not isinstance(do_sample, bool):
        raise UserError(f"do_sample={do_sample!r} must be true or false")
    penalty = given.get("repetition_penalty", 1.0)
    if not do_sample:
        return Sampling(temperature=0.0, repetition_penalty=penalty)
    if temperature == 0:
        raise UserError("do_sample=True needs a temperature above 0; give one, or do_sample=False")
    return Sampling(
        temperature=temperature,
        # 0 keeps all, as in Hugging Face.
        top_k=given.get("top_k") or None,
        top_p=given.get("top_p"),
        min_p=given.get("min_p"),
        repetition_penalty=penalty,
    )


def continue_all(
    params: Params | PackedParams,
    config: GPT2Config,
    prompts: Sequence[Sequence[int]],
    wanted: Sequence[Generation],
    *,
    max_length: int,
    batch_size: int,
    seed: int = 0,
) -> Iterator[tuple[int, str]]:
    """Continues prompts in batches of those that want the same, the longest first.

    Args:
      params: as for `generation.decode.generate`.
      config: the model.
      prompts: token ids in GPT-2's vocabulary, at least one a prompt. One loses its beginning
        where its new tokens would not fit behind it.
      wanted: what each text shall be.
      max_length: most tokens in the model's context, at most its `n_positions`.
      batch_size: most prompts in a batch.
      seed: of the first batch's draws, in [0, 2^32); the others have the next ones.

    Yields:
      Which prompt, and its text without the stop string.

    Raises:
      UserError: if new tokens alone fill the context, and as `generate` does.
    """
    groups: dict[Generation, list[int]] = {}
    for number, one in enumerate(wanted):
        if one.max_gen_toks >= max_length:
            raise UserError(
                f"max_gen_toks={one.max_gen_toks} leaves no room for a prompt in a context of "
                f"{max_length}; give less"
            )
        groups.setdefault(one, []).append(number)
    for one, numbers in groups.items():
        room = max_length - one.max_gen_toks
        warn_of_cuts([len(prompts[number]) for number in numbers], room)
        # A batch is padded to its longest prompt.
        numbers.sort(key=lambda number: -len(prompts[number]))
        for start in range(0, len(numbers), batch_size):
            batch = numbers[start : start + batch_size]
            # The last batch is filled up, so that it needs no program of its own.
            filled = itertools.islice(itertools.cycle(batch), min(batch_size, len(numbers)))
            cut = [prompts[number][-room:] for number in filled]
            texts = continue_until(params, config, cut, one, seed=seed)
            yield from zip(batch, texts, strict=False)
            seed = (seed + 1) % 2**32


def continue_until(
    params: Params | PackedParams,
    config: GPT2Config,
    prompts: Sequence[Sequence[int]],
    wanted: Generation,
    *,
    seed: int = 0,
) -> list[str]:
    """Continues prompts together until each has met a stop string or its last token.

    Args:
      params: as for `generation.decode.generate`.
      config: the model.
      prompts: token ids in GPT-2's vocabulary; one and `max_gen_toks` must fit in the context.
      wanted: what the texts shall be.
      seed: of the random draws, in [0, 2^32).

    Returns:
      The texts without their stop strings.

    Raises:
      UserError: as `generate` does.
    """
    texts = [""] * len(prompts)
    streams = [TextStream() for _ in prompts]
    growing = set(range(len(prompts)))

    def grow(row: int, piece: str) -> bool:
        """Adds to a text; whether a stop string ends in what was added."""
        before, texts[row] = len(texts[row]), texts[row] + piece
        return any(stop in texts[row][max(0, before - len(stop) + 1) :] for stop in wanted.until)

    for new in stream(
        params,
        config,
        prompts,
        max_new_tokens=wanted.max_gen_toks,
        sampling=wanted.sampling,
        seed=seed,
    ):
        if new.row in growing:
            ended = new.token == END_OF_TEXT_ID or grow(new.row, streams[new.row].feed(new.token))
            if ended or new.finish_reason is not None:
                growing.remove(new.row)
        if not growing:
            break
    for row, unfinished in enumerate(streams):
        grow(row, unfinished.end())
    return [_cut(text, wanted.until) for text in texts]


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text
