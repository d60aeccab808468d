"""Merged adapters compute what PyTorch does with the two narrow products beside each layer."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch

from gpt2_jax.lora import lora_shapes, merge
from gpt2_jax.lora_settings import TARGETS, LoraSettings
from gpt2_jax.model import GPT2, apply
from parity.checks import LOGITS_BOUND
from parity.models import Models, random_tokens
from parity.outcomes import Prove, bounded

SETTINGS = LoraSettings(
    targets=TARGETS,
    rank=4,
    alpha=6.0,
    rs_lora=True,
    rank_pattern=(("h_1.mlp.c_fc", 7),),
    alpha_pattern=(("attn.c_proj", 2.0),),
)


def test_merged_logits_are_those_of_adapters_beside_the_layers(small: Models, prove: Prove) -> None:
    config = small.config
    rng = np.random.default_rng(4)
    lora = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32),
        lora_shapes(config, SETTINGS),
    )
    theirs = copy.deepcopy(small.huggingface)
    for block in range(config.n_layer):
        for target in TARGETS:
            module, name = target.split(".")
            a_IR, b_RO = (
                torch.from_numpy(np.array(lora[f"h_{block}"][module][name][matrix]))
                for matrix in ("lora_a", "lora_b")
            )
            rank = 7 if (block, target) == (1, "mlp.c_fc") else 4
            scaling = (2.0 if target == "attn.c_proj" else 6.0) / rank**0.5

            def add(_module, inputs, output, a_IR=a_IR, b_RO=b_RO, scaling=scaling):  # type: ignore[no-untyped-def]
                return output + scaling * (inputs[0] @ a_IR @ b_RO)

            theirs.get_submodule(f"transformer.h.{block}.{target}").register_forward_hook(add)

    tokens_BT = random_tokens(config, (2, config.n_positions))
    with torch.no_grad():
        expected, plain = (
            model(torch.from_numpy(tokens_BT)).logits.numpy()
            for model in (theirs, small.huggingface)
        )
    forward = jax.jit(functools.partial(apply, GPT2(config)))
    ours = forward(merge(small.params, lora, SETTINGS), jnp.asarray(tokens_BT, jnp.int32))
    prove(bounded("logits with merged LoRA, JAX - Hugging Face", expected, ours, LOGITS_BOUND))
    assert np.abs(expected - plain).max() > 1
