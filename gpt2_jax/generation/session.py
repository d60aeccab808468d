"""One call of `generate` or `stream`: what the host knows of its rows, and the loop over steps.

Lengths are rounded up before compiling, so that calls share programs: only the model, the rules
and those rounded lengths are compiled in.
"""

import collections
import zlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.generation import engine
from gpt2_jax.generation.engine import CAPACITY, Made, Plan, Rows
from gpt2_jax.generation.sampling import Sampling
from gpt2_jax.model import GPT2
from gpt2_jax.packed import PackedParams, compute_dtype

SMALLEST_BUCKET = 32


class Session:
    """The rows of one call; nothing runs before `run`.

    Args:
      params: packed parameters.
      config: the model's.
      prompts: token ids, checked.
      limits: new tokens of the rows.
      sampling: how tokens are chosen.
      seed: of the draws.
      alternatives: None for the tokens alone, else how many of the likeliest to tell with each.
    """

    def __init__(
        self,
        params: PackedParams,
        config: GPT2Config,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        sampling: Sampling,
        seed: int,
        alternatives: int | None,
    ) -> None:
        lengths = [len(prompt) for prompt in prompts]
        context = config.n_positions
        # The last new token is never read, so it needs no slot.
        needed = max(map(sum, zip(lengths, limits, strict=True)), default=1) - 1
        slots = bucket(max(needed, bucket(max(lengths, default=1), context)), context)
        model = GPT2(config, dtype=compute_dtype(params.precision))
        self._plan = Plan(model, sampling, slots, alternatives)
        self._params, self._prompts = params, prompts
        self._limit_B = np.asarray(limits, np.int32)
        self._names_B2, self._key = _names(prompts), jax.random.key(seed)
        self._rows: Rows | None = None
        self.steps = CAPACITY
        """how many tokens of a row are made at a time; may be changed while `run` runs"""

    def run(self) -> Iterator[Made]:
        """Yields what the device makes, until every row is finished.

        The next steps are under way before the last ones are looked at, so that the device does
        not wait for the host. A row whose context is full is read again, its last half alone.
        """
        if not len(self._prompts):
            return
        texts = [list(prompt) for prompt in self._prompts]
        being_read = np.ones(len(texts), bool)
        under_way = collections.deque([self._read(texts, being_read)])
        while True:
            if len(under_way) < 2:
                under_way.append(self._decode())
            made = under_way.popleft().fetch()
            for row, text in enumerate(texts):
                text.extend(made.token_BC[row, : made.count_B[row]].tolist())
            yield made
            if made.finished_B.all():
                return
            # Steps that were under way before a row was read again still find it full.
            being_read = made.full_B & ~made.finished_B & ~being_read
            if being_read.any():
                half = max(1, self._plan.model.config.n_positions // 2)
                under_way.append(self._read([text[-half:] for text in texts], being_read))

    def _read(self, texts: Sequence[Sequence[int]], which_B: np.ndarray) -> Made:
        """Reads texts from an empty cache, for some rows, and chooses one token after each."""
        chosen = [text if which else [0] for text, which in zip(texts, which_B, strict=True)]
        lengths = [len(text) for text in chosen]
        tokens_BT = np.zeros((len(chosen), bucket(max(lengths), self._plan.slots)), np.int32)
        for row, text in enumerate(chosen):
            tokens_BT[row, : len(text)] = text
        length_B = np.asarray(lengths, np.int32)
        arguments = (self._params, self._rows, tokens_BT, length_B, which_B, *self._constants())
        self._rows, made = engine.compiled(engine.read)(*arguments, plan=self._plan)
        return made

    def _decode(self) -> Made:
        """Makes up to `steps` tokens for each row that can go on."""
        arguments = (self._params, self._rows, np.int32(self.steps), *self._constants())
        self._rows, made = engine.compiled(engine.decode)(*arguments, plan=self._plan)
        return made

    def _constants(self) -> tuple[np.ndarray, np.ndarray, jax.Array]:
        return self._limit_B, self._names_B2, self._key


def _names(prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """A name for each row that no other row changes, uint32 [B, 2]: the prompt, and which copy."""
    copies: collections.Counter[bytes] = collections.Counter()
    names = np.zeros((len(prompts), 2), np.uint32)
    for row, prompt in enumerate(prompts):
        content = np.asarray(prompt, np.int64).tobytes()
        names[row] = zlib.crc32(content), copies[content]
        copies[content] += 1
    return names


def bucket(length: int, limit: int) -> int:
    """`length` rounded up to a power of two or the middle between two, at most `limit`.

    Few programs then serve all lengths, and little of a cache lies idle.
    """
    step = max(SMALLEST_BUCKET, (1 << (length - 1).bit_length()) // 4)
    return min(-(-length // step) * step, limit)
