"""HellaSwag: which of four endings does the model find likeliest?

Zellers et al., 2019, "HellaSwag: Can a Machine Really Finish Your Sentence?". The protocol is
that of karpathy/build-nanogpt's hellaswag.py: an ending follows its context after a space, the
two are tokenized apart, and only the ending's tokens count. Other protocols differ in the texts
they make `Item`s of, or in how they turn losses into a choice; the rows and losses stay.

    items -> encode_items: rows of tokens -> ending_losses: sum and mean -> score
"""

import functools
import gzip
import itertools
import json
import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpt2_jax.config import check_positive_int
from gpt2_jax.errors import UserError
from gpt2_jax.model import GPT2, AdaptedParams, Params, apply
from gpt2_jax.tokenizer import VOCAB_SIZE, encode

PROTOCOL = "build-nanogpt"
ENDINGS = 4
# 64, 128 and 192 hold the whole validation set, whose longest row is 165: three compilations.
LENGTH_STEP = 64


class Item(NamedTuple):
    """One question."""

    context: str
    endings: tuple[str, ...]
    """four of them"""
    label: int
    """index of the true ending"""


class Rows(NamedTuple):
    """Texts of similar length, padded to one length T + 1: T inputs, and T targets one later."""

    tokens_BT: np.ndarray
    """int32 [B, T + 1]: context, ending, zeros"""
    mask_BT: np.ndarray
    """bool [B, T + 1], True at the ending's tokens"""
    places_B: np.ndarray
    """int [B], which ending of which item: 4 * item + ending"""


class HellaSwagScore(NamedTuple):
    """Shares of the items whose true ending won; guessing gives 0.25."""

    acc: float
    """the winner is the likeliest ending: smallest sum of its tokens' losses"""
    acc_norm: float
    """the winner is the ending likeliest per token: smallest mean"""
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


def read_items(path: Path, limit: int | None = None) -> list[Item]:
    """Reads a file of HellaSwag, such as hellaswag_val.jsonl with its 10,042 items.

    Args:
      path: one JSON object a line with "ctx", "endings" and "label"; gzipped if it ends in .gz.
      limit: read only the first items; None means all.

    Raises:
      UserError: if the file cannot be read or holds no items; if a line is no item, its number
        is named.
    """
    if limit is not None:
        check_positive_int("limit", limit)
    open_file: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    try:
        with open_file(path, "rt", encoding="utf-8") as lines:
            items = [
                _parse_item(line, f"{path}, line {number}")
                for number, line in enumerate(itertools.islice(lines, limit), start=1)
            ]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot read {path}: {reason}; give HellaSwag's hellaswag_val.jsonl or .jsonl.gz, "
            f"from github.com/rowanz/hellaswag"
        ) from None
    if not items:
        raise UserError(
            f"{path} is empty; give HellaSwag's hellaswag_val.jsonl or .jsonl.gz, "
            f"from github.com/rowanz/hellaswag"
        )
    return items


def _parse_item(line: str, where: str) -> Item:
    remedy = "take the file from github.com/rowanz/hellaswag"
    try:
        fields = json.loads(line)
    except ValueError:
        raise UserError(f"{where} is not JSON; {remedy}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{where} is not a JSON object; {remedy}")
    context, endings, label = (fields.get(name) for name in ("ctx", "endings", "label"))
    if not isinstance(context, str) or not context:
        raise UserError(f"{where}: ctx={context!r} must be a text, not empty; {remedy}")
    texts = endings if isinstance(endings, list) else []
    if len(texts) != ENDINGS or not all(isinstance(text, str) and text for text in texts):
        raise UserError(f"{where}: endings={endings!r} must be {ENDINGS} texts; {remedy}")
    if type(label) is not int or not 0 <= label < ENDINGS:
        raise UserError(
            f"{where}: label={label!r} must be a whole number from 0 to {ENDINGS - 1}; {remedy}"
        )
    return Item(context, tuple(texts), label)


def encode_items(items: Sequence[Item], max_length: int) -> list[Rows]:
    """Turns items into rows of tokens, grouped by length so that little is padding.

    The lengths T are multiples of `LENGTH_STEP`, and `max_length`: the same few whatever the
    items. A context that is too long loses its beginning, as in lm-evaluation-harness.

    Args:
      items: the questions.
      max_length: most inputs T of a row, the model's `n_positions`.

    Returns:
      Four rows for each item in all, the shortest first.

    Raises:
      UserError: if an ending alone has more than `max_length` tokens.
    """
    groups: dict[int, list[tuple[np.ndarray, int, int]]] = {}
    for number, item in enumerate(items):
        context = encode(item.context)
        for choice, text in enumerate(item.endings):
            ending = encode(" " + text)
            if len(ending) > max_length:
                raise UserError(
                    f"ending {choice} of HellaSwag item {number + 1} has {len(ending)} tokens, "
                    f"more than n_positions={max_length}; give a model of longer context"
                )
            tokens = np.concatenate([context, ending])[-(max_length + 1) :]
            length = min(-(-(len(tokens) - 1) // LENGTH_STEP) * LENGTH_STEP, max_length)
            row = tokens, len(tokens) - len(ending), ENDINGS * number + choice
            groups.setdefault(length, []).append(row)
    return [_pad(groups[length], length) for length in sorted(groups)]


def _pad(rows: list[tuple[np.ndarray, int, int]], length: int) -> Rows:
    """Stacks (tokens, start of the ending, place) into `Rows` of `length` inputs."""
    tokens_BT = np.zeros((len(rows), length + 1), np.int32)
    mask_BT = np.zeros(tokens_BT.shape, bool)
    for index, (tokens, start, _) in enumerate(rows):
        tokens_BT[index, : len(tokens)] = tokens
        mask_BT[index, start : len(tokens)] = True
    return Rows(tokens_BT, mask_BT, np.array([place for _, _, place in rows]))


def ending_losses(
    params: Params | AdaptedParams, tokens_BT: jax.Array, mask_BT: jax.Array, *, model: GPT2
) -> tuple[jax.Array, jax.Array]:
    """The losses of each row's marked tokens, given all tokens before them.

    Args:
      params: the model's parameters.
      tokens_BT: int32 [B, T + 1]; what follows the last marked token has no effect.
      mask_BT: bool [B, T + 1], True at the tokens that count: at least one in a row, and never
        the first, which nothing predicts.
      model: the model, static under jit.

    Returns:
      Their sum and their mean, nats, float32 [B] each.
    """
    logits_BTV = apply(model, params, tokens_BT[:, :-1])
    loss_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BT[:, 1:])
    counts_BT = mask_BT[:, 1:]
    sum_B = jnp.sum(jnp.where(counts_BT, loss_BT, 0), axis=-1)
    return sum_B, sum_B / jnp.sum(counts_BT, axis=-1)


def score(labels_N: np.ndarray, sums_NE: np.ndarray, means_NE: np.ndarray) -> HellaSwagScore:
    """Counts the items whose true ending has the smallest loss of its four.

    Args:
      labels_N: the true endings, int [N].
      sums_NE: the endings' summed losses [N, 4].
      means_NE: the endings' mean losses [N, 4].
    """
    acc, acc_norm = (
        float((losses_NE.argmin(axis=-1) == labels_N).mean()) for losses_NE in (sums_NE, means_NE)
    )
    return HellaSwagScore(acc, acc_norm, len(labels_N))


def make_hellaswag(
    model: GPT2,
    items: Sequence[Item],
    batch_size: int,
    put: Callable[[np.ndarray], Any] = jnp.asarray,
    result_sharding: jax.sharding.Sharding | None = None,
) -> Callable[[Params | AdaptedParams], HellaSwagScore]:
    """Returns the function that scores a model's parameters on fixed items.

    It compiles once for each length of `encode_items`, all in its first call.

    Args:
      model: the model.
      items: the questions.
      batch_size: rows in every forward pass, four to an item.
      put: places a host array [batch_size, T + 1] on the devices, its rows split as they like.
      result_sharding: where results [batch_size] go; None leaves it to the compiler. With many
        hosts every one must hold them all: replicated over the mesh.

    Raises:
      UserError: as `encode_items`, and if the model's vocabulary is smaller than GPT-2's.
    """
    if model.config.vocab_size < VOCAB_SIZE:
        raise UserError(
            f"vocab_size={model.config.vocab_size} is less than the {VOCAB_SIZE} of GPT-2's "
            f"tokenizer, which HellaSwag needs; give a model that has them"
        )
    losses_function = jax.jit(
        functools.partial(ending_losses, model=model), out_shardings=result_sharding
    )
    batches = [
        batch
        for rows in encode_items(items, model.config.n_positions)
        for batch in _batches(rows, batch_size)
    ]
    labels_N = np.array([item.label for item in items])

    def evaluate(params: Params | AdaptedParams) -> HellaSwagScore:
        # All are dispatched before the first is read, so the devices never wait.
        results = [
            losses_function(params, put(batch.tokens_BT), put(batch.mask_BT)) for batch in batches
        ]
        sums_NE, means_NE = np.zeros((2, len(items), ENDINGS), np.float32)
        for batch, (sum_B, mean_B) in zip(batches, results, strict=True):
            sums_NE.flat[batch.places_B] = np.asarray(sum_B)
            means_NE.flat[batch.places_B] = np.asarray(mean_B)
        return score(labels_N, sums_NE, means_NE)

    return evaluate


def _batches(rows: Rows, batch_size: int) -> list[Rows]:
    """Cuts rows into batches of one size; the last is filled up with rows from the front.

    Those rows' losses land where they belong a second time, and change nothing.
    """
    count = len(rows.places_B)
    order = np.arange(-(-count // batch_size) * batch_size) % count
    return [Rows(*(array[part] for array in rows)) for part in order.reshape(-1, batch_size)]
