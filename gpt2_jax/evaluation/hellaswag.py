"""HellaSwag: which of four endings does the model find likeliest?

Zellers et al., 2019, "HellaSwag: Can a Machine Really Finish Your Sentence?". Two protocols are
in use, and OpenAI's 124M model scores 0.2955 (acc_norm) by the one and 0.3114 by the other:

- build-nanogpt, hellaswag.py: the text as it is; context and ending are tokenized apart; acc_norm
  takes the ending of the smallest loss per token.
- lm-evaluation-harness, tasks/hellaswag: the activity's name goes before the context, WikiHow's
  marks in brackets go out, the two are tokenized together; acc_norm takes the smallest loss per
  character.

By both, acc takes the smallest loss of a whole ending.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.errors import UserError
from gpt2_jax.evaluation.continuations import Continuation, Report, make_scorer
from gpt2_jax.evaluation.hellaswag_items import Item, Protocol
from gpt2_jax.evaluation.rows import Question
from gpt2_jax.model import GPT2, AdaptedParams, Params
from gpt2_jax.tokenizer import END_OF_TEXT_ID, VOCAB_SIZE, encode


class HellaSwagScore(NamedTuple):
    """Shares of the items whose true ending won; guessing gives 0.25."""

    acc: float
    acc_norm: float
    items: int
    """number of items"""

    @property
    def acc_stderr(self) -> float:
        """Standard error of `acc`, as of a mean of independent items."""
        return _standard_error(self.acc, self.items)

    @property
    def acc_norm_stderr(self) -> float:
        """Standard error of `acc_norm`."""
        return _standard_error(self.acc_norm, self.items)


def _standard_error(share: float, count: int) -> float:
    """sqrt(p (1 - p) / N)."""
    return math.sqrt(share * (1 - share) / count)


@dataclasses.dataclass(frozen=True, eq=False)
class HellaSwagResult:
    """What came of every item by one protocol.

    Attributes:
      labels_N: the true endings.
      sums_NE: the endings' losses, nats, float64 [N, 4].
      lengths_NE: what acc_norm divides them by, tokens or characters.
      cut_N: whether an ending's text was too long for the model and lost its beginning.
    """

    protocol: Protocol
    labels_N: np.ndarray
    sums_NE: np.ndarray
    lengths_NE: np.ndarray
    cut_N: np.ndarray

    @functools.cached_property
    def normalised(self) -> np.ndarray:
        """Nats per token or character; infinite for an ending of none."""
        with np.errstate(divide="ignore"):
            return self.sums_NE / self.lengths_NE

    @functools.cached_property
    def choices(self) -> np.ndarray:
        """The likeliest endings; the first of several."""
        return self.sums_NE.argmin(axis=-1)

    @functools.cached_property
    def normalised_choices(self) -> np.ndarray:
        """The endings likeliest for their length."""
        return self.normalised.argmin(axis=-1)

    @property
    def score(self) -> HellaSwagScore:
        """How often the true ending was chosen."""
        acc, acc_norm = (
            float((choices_N == self.labels_N).mean())
            for choices_N in (self.choices, self.normalised_choices)
        )
        return HellaSwagScore(acc, acc_norm, len(self.labels_N))

    def prediction(self, item: int) -> dict[str, Any]:
        """What was found of an item, as plain values."""
        cut = {"cut": True} if self.cut_N[item] else {}
        return {
            "acc": int(self.choices[item]),
            "acc_norm": int(self.normalised_choices[item]),
            "losses": self.sums_NE[item].round(6).tolist(),
            "lengths": self.lengths_NE[item].tolist(),
            **cut,
        }

    def ties(self, nats: float) -> int:
        """How many items might be chosen otherwise, by acc or acc_norm, for so small an error.

        Args:
          nats: that each ending's loss may be off, up or down.
        """
        close_N = np.zeros(len(self.labels_N), bool)
        for losses_NE, lengths_NE in (
            (self.sums_NE, np.ones_like(self.sums_NE)),
            (self.normalised, self.lengths_NE),
        ):
            with np.errstate(divide="ignore", invalid="ignore"):
                error_NE = nats / lengths_NE
                first_N1 = losses_NE.argmin(axis=-1, keepdims=True)
                best_N1 = np.take_along_axis(losses_NE + error_NE, first_N1, axis=-1)
                within_NE = losses_NE - error_NE <= best_N1
            # An ending of no length has an infinite loss, and no error makes it less.
            within_NE &= np.isfinite(losses_NE)
            close_N |= within_NE.sum(axis=-1) > 1
        return int(close_N.sum())


def make_hellaswag(
    model: GPT2,
    items: Sequence[Item],
    batch_size: int,
    put: Callable[[np.ndarray], Any] = jnp.asarray,
    result_sharding: jax.sharding.Sharding | None = None,
    *,
    protocol: Protocol = "build-nanogpt",
) -> Callable[..., HellaSwagResult]:
    """Returns the function that scores a model's parameters on fixed items.

    Arguments and compilation are those of `make_scorer`; the function takes a `report` as well.

    Raises:
      UserError: if the model's vocabulary is smaller than GPT-2's.
    """
    if model.config.vocab_size < VOCAB_SIZE:
        raise UserError(
            f"vocab_size={model.config.vocab_size} is less than the {VOCAB_SIZE} of GPT-2's "
            f"tokenizer, which HellaSwag needs; give a model that has them"
        )
    scorer = make_scorer(model, batch_size, put, result_sharding)
    batches = scorer.arrange([question(item, protocol) for item in items])

    def evaluate(params: Params | AdaptedParams, report: Report | None = None) -> HellaSwagResult:
        return judge(items, scorer.run(params, batches, report), protocol)

    return evaluate


def question(item: Item, protocol: Protocol) -> Question:
    """The tokens of an item's context and endings."""
    if protocol == "build-nanogpt":
        return Question(encode(item.ctx), tuple(encode(" " + text) for text in item.endings))
    context, endings = cleaned(item)
    # The harness tokenizes context and ending together and cuts where the context's tokens end.
    bare = context.rstrip()
    encode_special = functools.partial(encode, allow_end_of_text=True)
    context_tokens = encode_special(bare)
    start = len(context_tokens)
    whole = [encode_special(f"{context} {ending}") for ending in endings]
    if not start:
        context_tokens = np.array([END_OF_TEXT_ID])
    return Question(context_tokens, tuple(tokens[start:] for tokens in whole))


def judge(
    items: Sequence[Item], found: Sequence[Sequence[Continuation]], protocol: Protocol
) -> HellaSwagResult:
    """Puts together what was found of each item's endings."""
    sums_NE = np.array(
        [[ending.losses_E.sum(dtype=np.float64) for ending in endings] for endings in found]
    )
    if protocol == "build-nanogpt":
        lengths = [[len(ending.losses_E) for ending in endings] for endings in found]
    else:
        lengths = [[len(text) for text in cleaned(item)[1]] for item in items]
    cut_N = np.array([any(ending.cut for ending in endings) for endings in found])
    labels_N = np.array([item.label for item in items])
    return HellaSwagResult(protocol, labels_N, sums_NE, np.array(lengths), cut_N)


def cleaned(item: Item) -> tuple[str, list[str]]:
    """Context and endings as lm-evaluation-harness makes them."""
    context = f"{item.activity_label}: {item.ctx_a} {item.ctx_b.capitalize()}"
    return _without_marks(context), [_without_marks(ending) for ending in item.endings]


def _without_marks(text: str) -> str:
    """A headline is set off by a full stop, WikiHow's other marks are left out."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")
