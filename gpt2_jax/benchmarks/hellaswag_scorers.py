"""Three ways to score HellaSwag's endings by lm-evaluation-harness's protocol.

Ours; PyTorch with one text at a time, which is the plainest; and the harness's own `hf` model.
Each runs in a process of its own, on the device its library takes.
"""

import contextlib
import dataclasses
import importlib.util
import io
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, Protocol, get_args

import numpy as np

from gpt2_jax.benchmarks.worker import cpu_cores
from gpt2_jax.evaluation.hellaswag_items import Item

Contestant = Literal["ours", "torch", "harness"]
CONTESTANTS: tuple[Contestant, ...] = get_args(Contestant)
TITLES: dict[Contestant, str] = {
    "ours": "gpt2_jax",
    "torch": "PyTorch, text by text",
    "harness": "lm-eval, hf model",
}
Dtype = Literal["bfloat16", "float32"]
PROTOCOL: Final = "lm-evaluation-harness"

_PACKAGES: dict[Contestant, tuple[str, ...]] = {
    "ours": (),
    "torch": ("torch", "transformers"),
    "harness": ("torch", "transformers", "lm_eval"),
}


def missing_packages(name: Contestant) -> list[str]:
    """What pip would have to install for a contestant."""
    return [package for package in _PACKAGES[name] if importlib.util.find_spec(package) is None]


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to be scored."""

    directory: Path
    """the model and its tokenizer, as Hugging Face writes them"""
    items: tuple[Item, ...]
    dtype: Dtype
    batch_sizes: tuple[int, ...]
    """rows of a batch, of which a contestant takes what is fastest"""


class EndingScorer(Protocol):
    """A contestant; made from a `Task`, on which its first `score` compiles what it needs."""

    device: str
    batch_size: int | None

    def score(self, items: Sequence[Item]) -> np.ndarray:
        """The endings' summed losses, nats, float64 [N, 4]; tokenizing is part of the work."""


def open_scorer(name: Contestant, task: Task) -> EndingScorer:
    """Loads a contestant; it has then settled on its batch size."""
    if name == "torch":
        return _TextByText(task)
    make = _Ours if name == "ours" else _Harness
    if len(task.batch_sizes) == 1:
        return make(task, task.batch_sizes[0])
    sample = task.items[:: max(1, len(task.items) // 32)]
    seconds = {}
    for batch_size in task.batch_sizes:
        scorer = make(task, batch_size)
        scorer.score(sample)
        start = time.perf_counter()
        scorer.score(sample)
        seconds[batch_size] = time.perf_counter() - start
    return make(task, min(seconds, key=seconds.__getitem__))


class _Ours:
    batch_size: int | None

    def __init__(self, task: Task, batch_size: int) -> None:
        import jax

        from gpt2_jax.evaluation.continuations import make_scorer
        from gpt2_jax.interop.pretrained import load_pretrained
        from gpt2_jax.model import GPT2

        params, config = load_pretrained(task.directory)
        self._params = jax.device_put(params, jax.devices()[0])
        self._scorer = make_scorer(GPT2(config, dtype=task.dtype), batch_size)
        self.batch_size = batch_size
        self.device = jax.default_backend()

    def score(self, items: Sequence[Item]) -> np.ndarray:
        from gpt2_jax.evaluation.hellaswag import judge, question

        questions = [question(item, PROTOCOL) for item in items]
        return judge(items, self._scorer(self._params, questions), PROTOCOL).sums_NE


class _TextByText:
    batch_size: int | None = None

    def __init__(self, task: Task) -> None:
        import torch

        self._model = _torch_model(task)
        self.device = self._model.device.type
        torch.set_num_threads(cpu_cores())

    def score(self, items: Sequence[Item]) -> np.ndarray:
        import torch

        from gpt2_jax.evaluation.hellaswag import question

        sums = []
        for item in items:
            context, endings = question(item, PROTOCOL)
            for ending in endings:
                text_T = torch.from_numpy(np.concatenate([context, ending]).astype(np.int64))
                text_T = text_T[-self._model.config.n_positions - 1 :].to(self._model.device)
                with torch.inference_mode():
                    logits_TV = self._model(text_T[None, :-1], use_cache=False).logits[0]
                count = min(len(ending), len(text_T) - 1)
                losses_E = torch.nn.functional.cross_entropy(
                    logits_TV[-count:].float(), text_T[-count:], reduction="none"
                )
                sums.append(float(losses_E.double().sum()))
        return np.array(sums).reshape(len(items), -1)


class _Harness:
    batch_size: int | None

    def __init__(self, task: Task, batch_size: int) -> None:
        import torch

        logging.disable(logging.WARNING)
        os.environ["HF_HUB_OFFLINE"] = "1"
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoTokenizer

        torch.set_num_threads(cpu_cores())
        tokenizer = AutoTokenizer.from_pretrained(task.directory)
        # Its cache of logits can take two requests for one.
        self._lm = HFLM(
            _torch_model(task), tokenizer=tokenizer, batch_size=batch_size, logits_cache=False
        )
        self.device = self._lm.device.type
        self.batch_size = batch_size

    def score(self, items: Sequence[Item]) -> np.ndarray:
        from lm_eval.api.instance import Instance

        from gpt2_jax.evaluation.hellaswag import cleaned

        texts = [cleaned(item) for item in items]
        pairs = [(context, f" {ending}") for context, endings in texts for ending in endings]
        requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
        with contextlib.redirect_stderr(io.StringIO()):
            answers = self._lm.loglikelihood(requests, disable_tqdm=True)
        return -np.array([score for score, _ in answers], np.float64).reshape(len(items), -1)


def _torch_model(task: Task) -> Any:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model: Any = transformers.GPT2LMHeadModel.from_pretrained(
        task.directory, dtype=getattr(torch, task.dtype)
    )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
