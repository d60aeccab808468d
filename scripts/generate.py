"""Continues a prompt: python scripts/generate.py --model gpt2 --prompt "Hello, my name is"."""

import dataclasses
import sys

from gpt2_jax import tokenizer
from gpt2_jax.cli import parse_flags, run
from gpt2_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Flags:
    """Generates text with a GPT-2. The text goes to stdout, all else to stderr."""

    prompt: str
    """text to continue"""
    source: str = "pretrained"
    """pretrained, a run directory of train.py, or a Hugging Face model directory"""
    model: str | None = None
    """pretrained size: gpt2 (the default), gpt2-medium, gpt2-large or gpt2-xl"""
    weights: str | None = None
    """pretrained weights from here, not the hub: a .pt or .safetensors file, or a directory"""
    revision: str | None = None
    """branch, tag or commit of the pretrained model on the hub"""
    max_new_tokens: int = 50
    """longest continuation, in tokens"""
    num_samples: int = 1
    """how many continuations to draw"""
    greedy: bool = False
    """always take the likeliest token"""
    temperature: float = 1.0
    """divides the logits before drawing: below 1 bolder, above 1 wilder, 0 is greedy"""
    top_k: int | None = 50
    """draw from this many of the likeliest tokens only"""
    top_p: float | None = None
    """draw from the likeliest tokens that together have this probability only"""
    seed: int = 0
    """of the draws: the same seed gives the same text"""
    allow_end_of_text: bool = False
    """let <|endoftext|> in the prompt be that token instead of plain characters"""


def main() -> None:
    """Checks the flags, loads the model, prints the samples."""
    flags = parse_flags(Flags)
    tokens = tokenizer.encode(flags.prompt, allow_end_of_text=flags.allow_end_of_text).tolist()

    # Only now the slow imports, so that --help and mistakes answer at once.
    from gpt2_jax.generation.decode import check_prompt, generate, room
    from gpt2_jax.generation.sampling import GREEDY, Sampling
    from gpt2_jax.sources import load_source

    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p)
    if not 0 <= flags.seed < 2**32:
        raise UserError(f"seed={flags.seed} must be in [0, 2^32)")
    for name in ("max_new_tokens", "num_samples"):
        if getattr(flags, name) < 1:
            raise UserError(f"{name}={getattr(flags, name)} must be at least 1")
    if not tokens:
        raise UserError(
            'the prompt is empty; give some text, or --prompt "<|endoftext|>" '
            "--allow_end_of_text for a text from nothing"
        )
    params, config = load_source(
        flags.source, model=flags.model, weights=flags.weights, revision=flags.revision
    )
    check_prompt(tokens, config)
    if flags.max_new_tokens > room(config, len(tokens)):
        print(
            f"note: stopping after {room(config, len(tokens))} tokens, where the context of "
            f"{config.n_positions} is full",
            file=sys.stderr,
        )
    samples = generate(
        params,
        config,
        [tokens] * flags.num_samples,
        max_new_tokens=flags.max_new_tokens,
        sampling=GREEDY if flags.greedy else sampling,
        seed=flags.seed,
    )
    for index, sample in enumerate(samples):
        if sample[-1] == config.eos_token_id:
            sample = sample[:-1]
        if index:
            print("-" * 40)
        print(flags.prompt + tokenizer.decode(sample))


if __name__ == "__main__":
    run(main)
