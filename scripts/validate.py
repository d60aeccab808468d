"""Proves a GPT-2 equal in JAX and PyTorch: python scripts/validate.py --random_init."""

import dataclasses
import sys

from gpt2_jax import tokenizer
from gpt2_jax.cli import parse_flags, run
from gpt2_jax.config import config_for_size
from gpt2_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Flags:
    """Compares weights, logits, loss and greedy text of JAX, Hugging Face and the reference.

    Exits with 0 if all agree, with 1 if something differs.
    """

    model: str | None = None
    """size: gpt2 (the default), gpt2-medium, gpt2-large or gpt2-xl"""
    weights: str | None = None
    """weights from here instead of the hub: a .pt or .safetensors file, or a directory"""
    revision: str | None = None
    """branch, tag or commit of the model on the hub"""
    random_init: bool = False
    """use random weights, drawn by Hugging Face; needs no weights at hand"""
    prompt: str = "The quick brown fox"
    """text whose logits and loss are compared"""
    gen_prompt: str = "Hello, my name is"
    """text that is continued greedily"""
    max_new_tokens: int = 50
    """length of the continuation, in tokens"""


def main() -> int:
    """Runs the checks and prints the table; returns the exit status."""
    flags = parse_flags(Flags)
    if flags.random_init and (flags.weights or flags.revision):
        raise UserError("--random_init goes without --weights and --revision; drop one")
    if flags.max_new_tokens < 1:
        raise UserError(f"max_new_tokens={flags.max_new_tokens} must be at least 1")
    config = config_for_size(flags.model) if flags.model else None
    prompts = [tokenizer.encode(text).tolist() for text in (flags.prompt, flags.gen_prompt)]
    if len(prompts[0]) < 2:
        raise UserError(f"prompt {flags.prompt!r} is shorter than 2 tokens; give more text")

    # Only now the slow imports, so that --help and mistakes answer at once.
    import numpy as np
    import transformers

    from gpt2_jax.generation.decode import check_prompt
    from parity import checks
    from parity.models import pretrained_models, random_models

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if flags.random_init:
        models = random_models(config or config_for_size("gpt2"))
    else:
        source = flags.weights or flags.model or "gpt2"
        models = pretrained_models(source, config if flags.weights else None, flags.revision)
    for prompt in prompts:
        check_prompt(prompt, models.config)

    tokens_BT = np.array([prompts[0]])
    results = [
        checks.check_state_dict(models),
        *checks.check_logits(models, tokens_BT),
        *checks.check_loss(models, tokens_BT),
        checks.check_greedy(models, prompts[1], flags.max_new_tokens),
    ]
    _print_table(results)
    return 0 if all(check.passed for check in results) else 1


def _print_table(results) -> None:  # type: ignore[no-untyped-def]
    from rich.console import Console

    from parity.outcomes import table_of

    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table_of(results, "JAX against PyTorch"))
    for check in results:
        for detail in check.details:
            console.print(f"{check.name}: {detail}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    run(main)
