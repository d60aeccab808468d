"""How likely a model finds what may follow a context: the loss of every token that follows.

HellaSwag, perplexity and lm-evaluation-harness's tasks are all made of this. The output head, a
third of a small model's work, is computed only where a token is predicted.

Shapes: B rows, T positions, M predictions of a row, m of them computed together, V vocabulary.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from gpt2_jax.attention import Branches
from gpt2_jax.evaluation.rows import PREDICTIONS_STEP, Batch, Question, length_step, make_batches
from gpt2_jax.model import GPT2, AdaptedParams, Params, apply
from gpt2_jax.precision import round_kernels

__all__ = ["Continuation", "Question", "Scorer", "make_scorer"]

# Questions that a call arranges at a time: the notes on their rows are larger than their tokens.
_TOGETHER = 4096
# Batches under way while the host looks at the one before them.
_LOOKAHEAD = 2

Report = Callable[[int, int], None]
"""told how many predictions of all are done"""


class Continuation(NamedTuple):
    """How well a continuation was predicted."""

    losses_E: np.ndarray
    """of its tokens, nats, float32 [E]; only the last `n_positions` of a longer one"""
    greedy: bool
    """whether every token was the likeliest"""
    cut: bool
    """whether the text was too long for the model's context and lost its beginning"""


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Scores questions; made by `make_scorer`."""

    model: GPT2
    batch_size: int
    put: Callable[[np.ndarray], Any]
    jitted: Callable[..., tuple[jax.Array, jax.Array]]

    def __call__(
        self,
        params: Params | AdaptedParams,
        questions: Sequence[Question],
        report: Report | None = None,
    ) -> list[tuple[Continuation, ...]]:
        """Scores questions: a tuple for each, with an entry a continuation."""
        found: list[tuple[Continuation, ...]] = []
        longest = self.model.config.n_positions
        total = sum(min(len(text), longest) for _, texts in questions for text in texts)
        done = 0

        def report_all(of_part: int, _: int) -> None:
            if report is not None:
                report(done + of_part, total)

        for start in range(0, len(questions), _TOGETHER):
            batches = self.arrange(questions[start : start + _TOGETHER])
            found += self.run(params, batches, report_all)
            done += _predictions(batches)
        return found

    def arrange(self, questions: Sequence[Question]) -> list[Batch]:
        """The work for some questions, which may be done again and again."""
        step = length_step(jax.default_backend())
        return make_batches(questions, self.model.config.n_positions, self.batch_size, step)

    def run(
        self,
        params: Params | AdaptedParams,
        batches: Sequence[Batch],
        report: Report | None = None,
    ) -> list[tuple[Continuation, ...]]:
        """Scores what was arranged."""
        params = jax.tree.map(jnp.asarray, params)
        params, head = round_kernels(params, self.model.dtype), _head(params, self.model.dtype)
        found: dict[int, dict[int, Continuation]] = collections.defaultdict(dict)
        under_way: collections.deque[tuple[Batch, tuple[jax.Array, jax.Array]]]
        under_way = collections.deque()
        total, done = _predictions(batches), 0
        for batch in [*batches, *[None] * _LOOKAHEAD]:
            if batch is not None:
                under_way.append((batch, self._dispatch(params, head, batch)))
            if under_way and (batch is None or len(under_way) > _LOOKAHEAD):
                finished, results = under_way.popleft()
                _collect(found, finished, *jax.device_get(results))
                done += _predictions([finished])
                if report is not None:
                    report(done, total)
        return [
            tuple(found[number][index] for index in range(len(found[number])))
            for number in range(len(found))
        ]

    def _dispatch(
        self, params: Params | AdaptedParams, head: Params, batch: Batch
    ) -> tuple[jax.Array, jax.Array]:
        branches = None
        if batch.position_BT is not None and batch.branch_BT is not None:
            branches = Branches(self.put(batch.position_BT), self.put(batch.branch_BT))
        arrays = map(self.put, (batch.tokens_BT, batch.place_BM, batch.target_BM))
        return self.jitted(params, head, *arrays, branches, np.int32(batch.chunks))


def make_scorer(
    model: GPT2,
    batch_size: int,
    put: Callable[[np.ndarray], Any] = jnp.asarray,
    result_sharding: jax.sharding.Sharding | None = None,
) -> Scorer:
    """Returns what scores questions with a model; it compiles once for each length of rows.

    Args:
      model: the model.
      batch_size: rows in every forward pass.
      put: places a host array [batch_size, ...] on the devices, its rows split as they like.
      result_sharding: where results [batch_size, M] go; None leaves it to the compiler. With many
        hosts every one must hold them all: replicated over the mesh.
    """
    return Scorer(model, batch_size, put, _compiled(model, result_sharding))


@functools.lru_cache(maxsize=8)
def _compiled(
    model: GPT2, result_sharding: jax.sharding.Sharding | None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """`_losses`, jitted; scorers of one model share what was compiled."""
    return jax.jit(functools.partial(_losses, model=model), out_shardings=result_sharding)


def _predictions(batches: Sequence[Batch]) -> int:
    return sum(len(row.place) for batch in batches for row in batch.rows)


def _head(params: Params | AdaptedParams, dtype: DTypeLike) -> Params:
    """What the output head reads, in the compute dtype: rounding the table takes as long as it."""
    tree = params.params if isinstance(params, AdaptedParams) else params
    name = "lm_head" if "lm_head" in tree else "wte"
    return {name: {"embedding": tree[name]["embedding"].astype(dtype)}}


def _losses(
    params: Params | AdaptedParams,
    head: Params,
    tokens_BT: jax.Array,
    place_BM: jax.Array,
    target_BM: jax.Array,
    branches: Branches | None,
    chunks: jax.Array,
    *,
    model: GPT2,
) -> tuple[jax.Array, jax.Array]:
    """The loss of each target, nats, float32 [B, M], and whether it was the likeliest token.

    What lies behind the first `chunks` x m predictions stays 0.
    """
    x_BTD, _ = apply(model, params, tokens_BT, branches=branches, method="features")
    B, M = place_BM.shape

    def some(index: jax.Array, results: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start = index * PREDICTIONS_STEP
        place_Bm, target_Bm = (
            jax.lax.dynamic_slice_in_dim(array_BM, start, PREDICTIONS_STEP, axis=1)
            for array_BM in (place_BM, target_BM)
        )
        x_BmD = jnp.take_along_axis(x_BTD, place_Bm[:, :, None], axis=1)
        logits_BmV = apply(model, head, x_BmD, method="logits")
        top_Bm1 = jnp.max(logits_BmV, axis=-1, keepdims=True)
        log_sum_Bm1 = jnp.log(jnp.sum(jnp.exp(logits_BmV - top_Bm1), axis=-1, keepdims=True))
        target_Bm1 = jnp.take_along_axis(logits_BmV, target_Bm[:, :, None], axis=-1)
        found = top_Bm1 - target_Bm1 + log_sum_Bm1, target_Bm1 >= top_Bm1
        loss_BM, likeliest_BM = (
            jax.lax.dynamic_update_slice_in_dim(result_BM, found_Bm1[:, :, 0], start, axis=1)
            for result_BM, found_Bm1 in zip(results, found, strict=True)
        )
        return loss_BM, likeliest_BM

    return jax.lax.fori_loop(0, chunks, some, (jnp.zeros((B, M)), jnp.zeros((B, M), bool)))


def _collect(
    found: dict[int, dict[int, Continuation]],
    batch: Batch,
    loss_BM: np.ndarray,
    likeliest_BM: np.ndarray,
) -> None:
    """Hands the results of a batch to the continuations they are of."""
    for row, loss_M, likeliest_M in zip(batch.rows, loss_BM, likeliest_BM, strict=False):
        for span in row.spans:
            part = slice(span.start, span.end)
            found[span.question][span.continuation] = Continuation(
                loss_M[part], bool(likeliest_M[part].all()), span.cut
            )
