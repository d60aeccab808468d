"""Weights stored in fewer bits: the same as Hugging Face's model with weights so rounded."""

import copy
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from gpt2_jax.generation.decode import generate
from gpt2_jax.interop.huggingface import state_dict_from_params
from gpt2_jax.model import GPT2, Params, apply
from gpt2_jax.packed import PackedMatrix, Precision, pack
from gpt2_jax.packed_words import PackedWords, unpack
from parity.models import Models, pretrained_models, random_tokens
from parity.outcomes import Check, Prove, relative_error


def rounded(params: Params, packed: dict[str, Any]) -> Params:
    """The parameters with every packed matrix in place of its own, in float32 again."""
    merged = dict(params)
    for name, child in packed.items():
        if isinstance(child, dict):
            merged[name] = rounded(params[name], child)
        else:
            outputs, inputs = params[name].shape[:: -1 if name == "kernel" else 1]
            weight_FD = weights(child, inputs)[:outputs]
            merged[name] = weight_FD.T if name == "kernel" else weight_FD
    return merged


def weights(matrix: PackedMatrix | PackedWords, inputs: int) -> np.ndarray:
    if isinstance(matrix, PackedWords):
        matrix = PackedMatrix(unpack(matrix.words_FW, inputs))
    weight_FD = np.asarray(matrix.weight_FD.astype(np.float32))
    return weight_FD if matrix.scale_F is None else weight_FD * np.asarray(matrix.scale_F)[:, None]


@pytest.mark.parametrize(
    ("precision", "bound"),
    [
        # Activations are rounded too, by 0.17 %, for each of some 50 products.
        ("bf16", 5e-3),
        # They keep 15 bits, and are rounded by 0.004 % where the largest is four times the typical.
        ("int8", 2e-4),
    ],
)
@pytest.mark.parametrize("rows", [1, 2])
def test_logits_are_those_of_the_rounded_weights_at_124m(
    gpt2_124m: Models, rows: int, precision: Precision, bound: float, prove: Prove
) -> None:
    tokens_BT = random_tokens(gpt2_124m.config, (2, 17), seed=3)
    packed = pack(gpt2_124m.params, precision, rows=rows)
    ours_BTV = jax.jit(apply, static_argnums=0)(GPT2(gpt2_124m.config), packed, tokens_BT)

    params = rounded(gpt2_124m.params, packed.packed)
    theirs = copy.deepcopy(gpt2_124m.huggingface)
    state = state_dict_from_params(params, gpt2_124m.config)
    theirs.load_state_dict({name: torch.tensor(array) for name, array in state.items()})
    with torch.no_grad():
        theirs_BTV = theirs(torch.from_numpy(tokens_BT)).logits.numpy()
        exact_BTV = gpt2_124m.huggingface(torch.from_numpy(tokens_BT)).logits.numpy()

    error = relative_error(np.asarray(ours_BTV), theirs_BTV)
    shape = ours_BTV.shape
    prove(Check("logits of packed weights, JAX - Hugging Face", error, bound, shape, precision))
    assert error < relative_error(theirs_BTV, exact_BTV)


@pytest.mark.parametrize("precision", ["f32", "bf16", "int8"])
def test_a_trained_model_still_sorts(shared: Path, precision: Precision) -> None:
    """nano-sort: six symbols, then the same ones in order. All 729 inputs, and one by itself."""
    models = pretrained_models(shared / "fixtures/nano-sort")
    packed = pack(models.params, precision)
    prompts = [list(symbols) for symbols in itertools.product(range(3), repeat=6)]
    texts = generate(packed, models.config, prompts, max_new_tokens=6)
    assert texts == [sorted(prompt) for prompt in prompts]
    [alone] = generate(packed, models.config, [[2, 0, 1, 1, 2, 0]], max_new_tokens=6)
    assert alone == [0, 0, 1, 1, 2, 2]
