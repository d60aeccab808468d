"""All comparisons of one model, as `scripts/validate.py` asks for them."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from rich.table import Table

from gpt2_jax import tokenizer
from gpt2_jax.config import GPT2Config
from gpt2_jax.errors import UserError
from gpt2_jax.generation.decode import check_prompt
from gpt2_jax.generation.text_stream import speaks_gpt2
from parity import adamw, checks, trajectory
from parity.activations import Difference, check_activations
from parity.environment import environment
from parity.gradients import check_gradients, torch_gradients
from parity.layer_table import layer_table
from parity.models import Models, random_tokens
from parity.outcomes import Check
from parity.report import GreedyText, Report
from parity.trajectory import Curve


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What a model is compared on."""

    read: list[int]
    """tokens whose logits, loss and activations are compared"""
    continued: list[int]
    """tokens that are continued greedily"""


def make_prompts(read: str, continued: str, config: GPT2Config) -> tuple[Prompts, bool]:
    """The prompts in tokens, and whether they are those texts.

    A vocabulary smaller than GPT-2's does not hold the texts; it gets random tokens.

    Raises:
      UserError: if a text does not fit, or the first is shorter than 2 tokens.
    """
    speaks = speaks_gpt2(config)
    if speaks:
        texts = [tokenizer.encode(text).tolist() for text in (read, continued)]
    else:
        if config.n_positions < 2:
            raise UserError("a context of a single token has no next one; nothing to compare")
        length = min(16, config.n_positions)
        texts = random_tokens(config, (2, length)).tolist()
        texts[1] = texts[1][: length // 2 or 1]
    if len(texts[0]) < 2:
        raise UserError(f"prompt {read!r} is shorter than 2 tokens; give more text")
    for tokens in texts:
        check_prompt(tokens, config)
    return Prompts(*texts), speaks


@dataclasses.dataclass(frozen=True)
class Validation:
    """What the comparisons found."""

    title: str
    checks: list[Check]
    differences: dict[str, list[Difference]]
    """by the name of the PyTorch model; empty where activations were not asked for"""
    logits: tuple[np.ndarray, np.ndarray]
    """[T, V] of JAX and of Hugging Face"""
    greedy: GreedyText
    curves: tuple[Curve, Curve] | None
    """two training runs, where they were asked for"""

    def layer_tables(self) -> list[Table]:
        """The activations' differences for a terminal, a table for each PyTorch model."""
        return [layer_table(model, found) for model, found in self.differences.items()]

    def report(self) -> Report:
        """The same for the page."""
        return Report(
            title=self.title,
            checks=self.checks,
            differences=self.differences,
            logits=self.logits,
            greedy=[self.greedy],
            curves=self.curves,
            environment=environment(),
        )


def validate(
    models: Models,
    prompts: Prompts,
    *,
    title: str,
    max_new_tokens: int = 50,
    layers: bool = False,
    training_steps: int = 0,
) -> Validation:
    """Compares JAX with Hugging Face and with the reference, in float32.

    Args:
      models: the same weights three times.
      prompts: from `make_prompts`.
      title: what they are.
      max_new_tokens: of the greedy continuation.
      layers: whether to compare every activation.
      training_steps: length of the training run compared, after gradients and optimizer; 0 for
        none of them.
    """
    tokens_BT = np.array([prompts.read])
    ours_BTV = checks.jax_logits(models, tokens_BT)
    theirs_BTV = checks.torch_logits(models, tokens_BT)
    ours, theirs = checks.greedy_texts(models, prompts.continued, max_new_tokens)
    found = [
        checks.check_state_dict(models),
        *checks.compare_logits(ours_BTV, theirs_BTV),
        *checks.check_loss(models, tokens_BT),
        checks.compare_tokens("greedy tokens", ours, theirs),
    ]
    differences: dict[str, list[Difference]] = {}
    if layers:
        layer_checks, differences = check_activations(models, tokens_BT)
        found += layer_checks
    curves = None
    if training_steps:
        training_checks, curves = _train(models, training_steps)
        found += training_checks
    greedy = _greedy_text(prompts.continued, ours, theirs)
    logits = ours_BTV[0], theirs_BTV["Hugging Face"][0]
    return Validation(title, found, differences, logits, greedy, curves)


def _train(models: Models, steps: int) -> tuple[list[Check], tuple[Curve, Curve]]:
    """Gradients, optimizer and a whole run."""
    settings = trajectory.run_settings(models, steps)
    batches = trajectory.batches_of(settings)
    gradients = [torch_gradients(models.reference, batches(step)) for step in range(min(2, steps))]
    curves = (
        trajectory.train_in_jax(models, settings, batches),
        trajectory.train_in_torch(models, settings, batches),
    )
    found = [
        *check_gradients(models, batches(0)),
        *adamw.check_optimizer(models, gradients, settings.optimizer, steps),
        *trajectory.check_trajectory(*curves),
    ]
    return found, curves


def _greedy_text(prompt: Sequence[int], ours: Sequence[int], theirs: Sequence[int]) -> GreedyText:
    same = checks.equal_at_first(ours, theirs)
    return GreedyText(_spelt(prompt), _spelt(ours), _spelt(theirs), same, len(theirs))


def _spelt(tokens: Sequence[int]) -> str:
    """The text of tokens; their numbers, where one is not GPT-2's."""
    if all(token < tokenizer.VOCAB_SIZE for token in tokens):
        return tokenizer.decode(tokens)
    return " ".join(map(str, tokens))
