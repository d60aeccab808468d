"""The whole model against a second one: plain NumPy in float64, one position at a time."""

import dataclasses

import jax
import numpy as np
import pytest

from gpt2_jax.model import GPT2, apply, param_shapes


def layer_norm(x_D, params, epsilon):
    return (x_D - x_D.mean()) / np.sqrt(x_D.var() + epsilon) * params["scale"] + params["bias"]


def linear(x_D, params):
    return x_D @ params["kernel"] + params["bias"]


def gelu_new(x_F):
    return 0.5 * x_F * (1 + np.tanh(np.sqrt(2 / np.pi) * (x_F + 0.044715 * x_F**3)))


def attend(x_TD, params, heads):
    """The attention branch at the last position of x."""
    width = x_TD.shape[1] // heads
    q_TD, k_TD, v_TD = np.split(np.stack([linear(x_D, params["c_attn"]) for x_D in x_TD]), 3, 1)
    mixed = []
    for head in range(heads):
        columns = slice(head * width, (head + 1) * width)
        weight_S = np.exp(k_TD[:, columns] @ q_TD[-1, columns] / np.sqrt(width))
        mixed.append(weight_S / weight_S.sum() @ v_TD[:, columns])
    return linear(np.concatenate(mixed), params["c_proj"])


def gpt2(params, tokens, config):
    """Logits [T, V] of one text."""
    epsilon = config.layer_norm_epsilon
    x_TD = params["wte"]["embedding"][tokens] + params["wpe"]["embedding"][: len(tokens)]
    for layer in range(config.n_layer):
        block = params[f"h_{layer}"]
        normed_TD = np.stack([layer_norm(x_D, block["ln_1"], epsilon) for x_D in x_TD])
        branch_TD = [
            attend(normed_TD[: t + 1], block["attn"], config.n_head) for t in range(len(tokens))
        ]
        x_TD = x_TD + branch_TD
        hidden_TF = [
            gelu_new(linear(layer_norm(x_D, block["ln_2"], epsilon), block["mlp"]["c_fc"]))
            for x_D in x_TD
        ]
        x_TD = x_TD + [linear(hidden_F, block["mlp"]["c_proj"]) for hidden_F in hidden_TF]
    final_TD = np.stack([layer_norm(x_D, params["ln_f"], epsilon) for x_D in x_TD])
    head = params["wte"] if config.tie_word_embeddings else params["lm_head"]
    return final_TD @ head["embedding"].T


@pytest.mark.parametrize(
    "fields",
    [{}, {"tie_word_embeddings": False, "n_inner": 40, "layer_norm_epsilon": 0.1}],
    ids=["usual", "unusual"],
)
def test_logits_are_those_of_plain_numpy(tiny_config, fields):
    config = dataclasses.replace(tiny_config, **fields)
    rng = np.random.default_rng(9)
    params = jax.tree.map(
        lambda leaf: rng.normal(0.1, 0.2, leaf.shape).astype(np.float32), param_shapes(config)
    )
    exact = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    tokens_BT = rng.integers(0, 97, (2, 9))
    logits_BTV = jax.jit(apply, static_argnums=0)(GPT2(config), params, tokens_BT)
    for logits_TV, tokens_T in zip(logits_BTV, tokens_BT, strict=True):
        # Some hundred float32 roundings on the way to logits near 5.
        np.testing.assert_allclose(logits_TV, gpt2(exact, tokens_T, config), rtol=0, atol=2e-5)
