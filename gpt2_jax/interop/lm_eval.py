"""A model for EleutherAI's lm-evaluation-harness, which runs any of its tasks on it.

    from lm_eval import simple_evaluate
    import gpt2_jax.interop.lm_eval

    simple_evaluate(model="gpt2_jax", model_args="source=runs/x", tasks=["lambada_openai"])

What the harness asks for, and how it is answered:

    loglikelihood           requests of one context become one question of `make_scorer`
    loglikelihood_rolling   a text becomes windows, each token predicted once
    generate_until          `generation.stream`, until every row has met a stop string

Texts become tokens, and long ones are cut, as in the harness's own class for Hugging Face's GPT-2.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from gpt2_jax.config import GPT2Config, check_positive_int
from gpt2_jax.errors import UserError
from gpt2_jax.evaluation.continuations import make_scorer
from gpt2_jax.generation.text_stream import speaks_gpt2
from gpt2_jax.interop.lm_eval_generation import continue_all, read_generation
from gpt2_jax.interop.lm_eval_scoring import log_likelihoods
from gpt2_jax.model import GPT2, Params
from gpt2_jax.packed import PackedParams, Precision, pack
from gpt2_jax.sources import load_source
from gpt2_jax.tokenizer import END_OF_TEXT_ID, encode
from gpt2_jax.training.mesh import Layout, make_mesh
from gpt2_jax.training.settings import MeshSettings

BATCH_SIZE = 32
"""rows of a batch unless another number is asked for"""
_PRECISIONS: dict[str, Precision] = {"float32": "f32", "bfloat16": "bf16"}


@register_model("gpt2_jax")
class GPT2LM(TemplateLM):
    """A GPT-2 of this package in the harness.

    All devices share log-likelihoods; texts are generated on the first.

    Args:
      source: what `gpt2_jax.sources.load_source` takes, or parameters with their configuration.
      model: with "pretrained", the size.
      weights: with "pretrained", a local file or directory to read instead of the hub.
      revision: with "pretrained", branch, tag or commit on the hub.
      lora: directory of an adapter in PEFT's format, merged into the parameters.
      dtype: of the arithmetic, "float32" or "bfloat16".
      batch_size: rows of all devices together, rounded up to a multiple of their number. The
        harness's "auto" means `BATCH_SIZE`.
      max_batch_size: bounds "auto".
      max_length: most tokens in the model's context; None means `n_positions`.
      max_gen_toks: new tokens of a text whose request does not say.
      seed: of the random draws, in [0, 2^32).
      device: None. JAX takes what JAX_PLATFORMS names.

    Raises:
      UserError: if a value is out of its range, the model cannot be loaded or has another
        vocabulary than GPT-2's, or this is one of several processes.
    """

    eot_token_id = END_OF_TEXT_ID
    """also `prefix_token_id`, which stands before a text without context"""
    tokenizer_name = "gpt2"
    """what the harness keeps encoded requests under"""

    def __init__(
        self,
        source: str | tuple[Params, GPT2Config] = "gpt2",
        *,
        model: str | None = None,
        weights: str | None = None,
        revision: str | None = None,
        lora: str | None = None,
        dtype: str = "float32",
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if jax.process_count() > 1:
            raise UserError(f"this is one of {jax.process_count()} processes; start a single one")
        if device is not None:
            raise UserError(f"device={device!r} is PyTorch's; set JAX_PLATFORMS instead")
        if dtype not in _PRECISIONS:
            raise UserError(f"dtype={dtype!r} must be one of {', '.join(_PRECISIONS)}")
        check_positive_int("max_gen_toks", max_gen_toks)
        mesh = make_mesh(MeshSettings())
        layout = Layout(mesh, rows=_batch_rows(batch_size, max_batch_size, mesh.size), passes=1)
        names = {"model": model, "weights": weights, "revision": revision, "lora": lora}
        params, config = _load(source, names)
        self.config, self.dtype, self.batch_size = config, dtype, layout.rows
        self.max_length = config.n_positions if max_length is None else max_length
        check_positive_int("max_length", self.max_length)
        if self.max_length > config.n_positions:
            raise UserError(
                f"max_length={max_length} is more than n_positions={config.n_positions}; give less"
            )
        self.max_gen_toks = max_gen_toks
        self._source = source if isinstance(source, str) else None
        self._seed = seed
        self._params = jax.device_put(params, layout.replicated)
        self._scorer = make_scorer(
            GPT2(config, dtype=dtype), layout.rows, layout.put_rows, layout.replicated
        )

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        return {
            "model_source": self._source,
            "model_num_parameters": self.config.parameter_count,
            "model_dtype": self.dtype,
        }

    def apply_chat_template(self, *_: Any, **__: Any) -> NoReturn:
        """Raises UserError: GPT-2 was not made for chats."""
        raise UserError("apply_chat_template: GPT-2 has no chat template; leave it out")

    def tok_encode(self, string: str, *_: Any, **__: Any) -> list[int]:
        """Token ids as Hugging Face's GPT-2 tokenizer gives them: it adds no others.

        The characters "<|endoftext|>" become the token.

        Raises:
          UserError: if the text holds lone surrogates.
        """
        return encode(string, allow_end_of_text=True).tolist()

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihoods of whole texts, nats; each begins after <|endoftext|>.

        Every token is predicted once, from as many tokens as fit before its window's first.
        """
        windows = []
        for request in requests:
            of_text = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows.append([(None, *make_disjoint_window(window)) for window in of_text])
        flat = list(itertools.chain.from_iterable(windows))
        answers = iter(self._loglikelihood_tokens(flat, disable_tqdm=disable_tqdm))
        totals = []
        for request, of_text in zip(requests, windows, strict=True):
            totals.append(sum((score for score, _ in itertools.islice(answers, len(of_text))), 0.0))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations, nats, and whether every token was the likeliest.

        A context that is too long loses its beginning; one of white space alone is empty, as that
        has gone to the continuation, and <|endoftext|> takes its place.

        Raises:
          UserError: if a continuation has no tokens, or more than the model's context.
        """
        pairs = [(context or [self.prefix_token_id], tail) for _, context, tail in requests]
        with tqdm(unit="tok", desc="log-likelihoods", disable=disable_tqdm) as bar:
            scorer = functools.partial(self._scorer, self._params, report=_shown_in(bar))
            answers = log_likelihoods(scorer, pairs, self.max_length)
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues contexts up to a stop string, <|endoftext|> or `max_gen_toks` tokens.

        A context loses its beginning where those tokens would not fit behind it.

        Raises:
          UserError: if an argument of a request is not known or out of its range.
        """
        wanted = [read_generation(request.args[1], self.max_gen_toks) for request in requests]
        prompts = [self.tok_encode(one.args[0]) or [self.prefix_token_id] for one in requests]
        limits = {"max_length": self.max_length, "batch_size": self.batch_size}
        made = continue_all(self._packed, self.config, prompts, wanted, **limits, seed=self._seed)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="texts", disable=disable_tqdm) as bar:
            for number, text in made:
                texts[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
                bar.update()
        return texts

    @functools.cached_property
    def _packed(self) -> PackedParams:
        params = jax.device_put(self._params, jax.local_devices()[0])
        return pack(params, _PRECISIONS[self.dtype], rows=self.batch_size)


def _batch_rows(batch_size: int | str | None, most: int | None, devices: int) -> int:
    if isinstance(batch_size, str) and batch_size.isdecimal():
        batch_size = int(batch_size)
    if batch_size is None or (isinstance(batch_size, str) and batch_size.split(":")[0] == "auto"):
        batch_size = BATCH_SIZE if most is None else min(BATCH_SIZE, most)
    check_positive_int("batch_size", batch_size)
    assert isinstance(batch_size, int)
    return -(-batch_size // devices) * devices


def _load(
    source: str | tuple[Params, GPT2Config], names: Mapping[str, str | None]
) -> tuple[Params, GPT2Config]:
    if isinstance(source, tuple):
        params, config = source
        for name, value in names.items():
            if value is not None:
                raise UserError(f"{name}={value!r} goes with a named source; leave it out")
    else:
        # The harness makes a number of a directory that is named like one.
        params, config = load_source(str(source), **names)
    if not speaks_gpt2(config):
        raise UserError(
            f"vocab_size={config.vocab_size} is not that of GPT-2's tokenizer, by which tasks "
            f"become tokens; give a model that has it"
        )
    return params, config


def _shown_in(bar: tqdm) -> Callable[[int, int], None]:
    def report(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return report
