"""HellaSwag's losses are those of PyTorch with one text at a time, by both protocols."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpt2_jax.benchmarks.hellaswag_scorers import CONTESTANTS, Task, missing_packages, open_scorer
from gpt2_jax.config import GPT2Config
from gpt2_jax.evaluation.hellaswag import make_hellaswag
from gpt2_jax.evaluation.hellaswag_items import PROTOCOLS, Item, Protocol, read_items
from gpt2_jax.interop.export import export_model
from gpt2_jax.interop.tokenizer_files import gpt2_files
from gpt2_jax.model import GPT2
from parity.models import Models, random_models
from parity.outcomes import Check, Prove, bounded

ITEMS = 200
# Of sums of up to 1,000 nats.
BOUND = 1e-4


@pytest.fixture(scope="module")
def models() -> Models:
    """A context of 96 tokens, which some of the texts do not fit."""
    config = GPT2Config(n_positions=96, n_embd=48, n_layer=2, n_head=3, initializer_range=0.1)
    return random_models(config, seed=5)


@pytest.fixture(scope="module")
def items(shared: Path) -> list[Item]:
    """Spread over the set: the first ones are all of ActivityNet."""
    return read_items(shared / "data" / "hellaswag_val.jsonl.gz")[::50][:ITEMS]


def texts(
    item: Item, protocol: Protocol, tokenizer: Any
) -> Iterator[tuple[list[int], list[int], int]]:
    """Tokens of context and ending, and what acc_norm divides by, from others' code."""
    if protocol == "build-nanogpt":
        for ending in item.endings:
            tokens = tokenizer.encode(" " + ending)
            yield tokenizer.encode(item.ctx), tokens, len(tokens)
        return
    utils = pytest.importorskip("lm_eval.tasks.hellaswag.utils")
    context = utils.preprocess(f"{item.activity_label}: {item.ctx_a} {item.ctx_b.capitalize()}")
    for ending in map(utils.preprocess, item.endings):
        whole = tokenizer.encode(f"{context} {ending}")
        start = len(tokenizer.encode(context.rstrip()))
        yield whole[:start], whole[start:], len(ending)


def plain_loss(models: Models, context: list[int], ending: list[int]) -> float:
    """Summed over the ending, in float64, from a text's last tokens if it is too long."""
    text_T = torch.tensor((context + ending)[-(models.config.n_positions + 1) :])
    count = len(ending)
    with torch.inference_mode():
        x_TD = models.huggingface.transformer(text_T[None, :-1]).last_hidden_state[0]
        logits_EV = models.huggingface.lm_head(x_TD[-count:])
    losses_E = torch.nn.functional.cross_entropy(logits_EV, text_T[-count:], reduction="none")
    return float(losses_E.double().sum())


@pytest.mark.slow
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_two_hundred_items(
    models: Models, gpt2_tokenizer: Any, items: list[Item], protocol: Protocol, prove: Prove
) -> None:
    result = make_hellaswag(GPT2(models.config), items, 4, protocol=protocol)(models.params)
    endings = [list(texts(item, protocol, gpt2_tokenizer)) for item in items]
    sums_NE = np.array([[plain_loss(models, *text[:2]) for text in four] for four in endings])
    lengths_NE = np.array([[length for _, _, length in four] for four in endings])
    differing = (result.choices != sums_NE.argmin(axis=-1)) | (
        result.normalised_choices != (sums_NE / lengths_NE).argmin(axis=-1)
    )
    assert len(items) == ITEMS
    assert result.cut_N.sum() == sum(
        any(len(context) + len(ending) > 97 for context, ending, _ in four) for four in endings
    )
    assert 0 < result.cut_N.sum() < ITEMS
    count = int(differing.sum())
    prove(
        bounded(f"HellaSwag, {protocol}: losses of endings", sums_NE, result.sums_NE, BOUND),
        Check(
            f"HellaSwag, {protocol}: predictions",
            count,
            0,
            (ITEMS, 2),
            counted=f"{ITEMS - count} of {ITEMS} equal",
        ),
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_contestants_of_the_benchmark_find_the_same(
    models: Models, items: list[Item], tmp_path: Path, prove: Prove
) -> None:
    if missing := [package for name in CONTESTANTS for package in missing_packages(name)]:
        pytest.skip(f"not installed: {' '.join(missing)}")
    export_model(tmp_path / "model", models.params, models.config, files=gpt2_files(96))
    some = tuple(items[::20])
    task = Task(tmp_path / "model", some, "float32", (3,))
    ours, *others = (open_scorer(name, task).score(some) for name in CONTESTANTS)
    prove(
        *(
            # The harness sums in float32.
            bounded(f"HellaSwag, benchmark's {name}: losses of endings", sums_NE, ours, 1e-3)
            for name, sums_NE in zip(CONTESTANTS[1:], others, strict=True)
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("protocol", "acc", "acc_norm"),
    [("build-nanogpt", 0.2859, 0.2955), ("lm-evaluation-harness", 0.2892, 0.3114)],
)
def test_published_scores(
    real_gpt2: Models, shared: Path, protocol: Protocol, acc: float, acc_norm: float, prove: Prove
) -> None:
    """Of OpenAI's 124M weights on the whole set, as build-nanogpt's hellaswag.py tells them."""
    items = read_items(shared / "data" / "hellaswag_val.jsonl.gz")
    evaluate = make_hellaswag(GPT2(real_gpt2.config), items, 4, protocol=protocol)
    score = evaluate(real_gpt2.params).score
    ours = [score.acc, score.acc_norm]
    prove(bounded(f"HellaSwag, {protocol}: published scores", [acc, acc_norm], ours, 5e-4))
