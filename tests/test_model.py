"""The model as a function: causal, row by row, with the parameters Hugging Face names."""

import dataclasses
import doctest
import functools
import math

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from gpt2_jax import model as model_module
from gpt2_jax.block import ACTIVATIONS, MLP
from gpt2_jax.config import ACTIVATION_FUNCTIONS
from gpt2_jax.model import GPT2, init_params, param_shapes

TOKENS_BT = np.random.default_rng(1).integers(0, 97, (3, 8)).astype(np.int32)
init = jax.jit(init_params, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0, static_argnames="deterministic")
def apply(config, params, tokens_BT, **options):
    return GPT2(config).apply({"params": params}, tokens_BT, **options)


def test_the_examples_of_the_docstrings_show_what_they_print():
    found = doctest.testmod(model_module)
    assert found.attempted >= 5
    assert found.failed == 0


def test_future_tokens_do_not_change_the_past(tiny_config, tiny_params):
    """No gradient reaches a position's logits from the embedding of a later one."""
    T = 6
    # Every position holds another token, so a row of the table is the input of one position;
    # with the head untied, the table is nothing but input.
    config = dataclasses.replace(tiny_config, tie_word_embeddings=False)
    tokens_1T = jnp.arange(T)[None]
    direction_V = jax.random.normal(jax.random.key(3), (config.vocab_size,))

    def outputs(table_VD):
        params = tiny_params | {
            "wte": {"embedding": table_VD},
            "lm_head": tiny_params["wte"],
        }
        return apply(config, params, tokens_1T)[0] @ direction_V

    gradient_TVD = jax.jit(jax.jacrev(outputs))(tiny_params["wte"]["embedding"])
    influence_TS = np.abs(gradient_TVD).sum(axis=-1)[:, :T]
    assert np.all(influence_TS[np.triu_indices(T, k=1)] == 0)
    assert np.all(influence_TS[np.tril_indices(T)] > 0)


def test_a_row_does_not_depend_on_the_rows_beside_it(tiny_config, tiny_params):
    logits_BTV = apply(tiny_config, tiny_params, TOKENS_BT)
    others_BT = TOKENS_BT.copy()
    others_BT[1:] = (others_BT[1:] + 5) % 97
    np.testing.assert_array_equal(
        apply(tiny_config, tiny_params, others_BT)[0], logits_BTV[0], strict=True
    )
    # Another batch size may sum in another order: a few float32 roundings of logits near 10.
    alone_1TV = apply(tiny_config, tiny_params, TOKENS_BT[:1])
    np.testing.assert_allclose(alone_1TV[0], logits_BTV[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_are_float32_over_the_whole_vocabulary(tiny_config, tiny_params, dtype):
    model = GPT2(tiny_config, dtype=dtype)
    logits_BTV = jax.eval_shape(model.apply, {"params": tiny_params}, TOKENS_BT)
    assert logits_BTV.shape == (3, 8, 97)
    assert logits_BTV.dtype == jnp.float32


def test_parameters_have_the_documented_names_and_shapes(tiny_config):
    D, F, V, P = 32, 128, 97, 32
    expected = {
        "wte/embedding": (V, D),
        "wpe/embedding": (P, D),
        "ln_f/scale": (D,),
        "ln_f/bias": (D,),
    }
    for layer in ("h_0", "h_1"):
        for name, shape in {
            "ln_1/scale": (D,),
            "ln_1/bias": (D,),
            "attn/c_attn/kernel": (D, 3 * D),
            "attn/c_attn/bias": (3 * D,),
            "attn/c_proj/kernel": (D, D),
            "attn/c_proj/bias": (D,),
            "ln_2/scale": (D,),
            "ln_2/bias": (D,),
            "mlp/c_fc/kernel": (D, F),
            "mlp/c_fc/bias": (F,),
            "mlp/c_proj/kernel": (F, D),
            "mlp/c_proj/bias": (D,),
        }.items():
            expected[f"{layer}/{name}"] = shape
    flat = traverse_util.flatten_dict(param_shapes(tiny_config), sep="/")
    assert {path: leaf.shape for path, leaf in flat.items()} == expected
    assert {leaf.dtype for leaf in flat.values()} == {jnp.dtype(jnp.float32)}


def test_an_untied_head_has_its_own_table(shallow_config, shallow_params):
    config = dataclasses.replace(shallow_config, tie_word_embeddings=False)
    assert param_shapes(config)["lm_head"]["embedding"].shape == (97, 32)
    untied = shallow_params | {"lm_head": shallow_params["wte"]}
    np.testing.assert_array_equal(
        apply(config, untied, TOKENS_BT), apply(shallow_config, shallow_params, TOKENS_BT)
    )
    doubled = shallow_params | {"lm_head": {"embedding": 2 * shallow_params["wte"]["embedding"]}}
    # Doubling is exact in floating point.
    np.testing.assert_array_equal(
        apply(config, doubled, TOKENS_BT), 2 * apply(shallow_config, shallow_params, TOKENS_BT)
    )


def test_n_inner_is_the_width_of_the_mlp(tiny_config):
    config = dataclasses.replace(tiny_config, n_inner=40)
    shapes = param_shapes(config)
    assert shapes["h_0"]["mlp"]["c_fc"]["kernel"].shape == (32, 40)
    assert shapes["h_0"]["mlp"]["c_proj"]["kernel"].shape == (40, 32)
    run = functools.partial(apply, config, tokens_BT=TOKENS_BT)
    assert jax.eval_shape(run, shapes).shape == (3, 8, 97)


GELU_TANH = "0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))"
FORMULAS = {
    "gelu_new": GELU_TANH,
    "gelu_pytorch_tanh": GELU_TANH,
    "gelu": "0.5 * x * (1 + erf(x / sqrt(2)))",
    "relu": "max(x, 0.0)",
    "silu": "x / (1 + exp(-x))",
    "tanh": "tanh(x)",
}


def test_every_activation_a_config_may_name_is_there():
    assert set(ACTIVATION_FUNCTIONS) == set(ACTIVATIONS) == set(FORMULAS)


@pytest.mark.parametrize("name", ACTIVATION_FUNCTIONS)
def test_the_mlp_follows_the_formula_of_its_activation(shallow_config, shallow_params, name):
    config = dataclasses.replace(shallow_config, activation_function=name)
    params = shallow_params["h_0"]["mlp"]
    x_BTD = np.random.default_rng(0).normal(0, 2, (2, 3, 32)).astype(np.float32)
    actual_BTD = MLP(config, jnp.float32).apply({"params": params}, x_BTD)

    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    hidden_BTF = x_BTD @ weights["c_fc"]["kernel"] + weights["c_fc"]["bias"]
    formula = compile(FORMULAS[name], name, "eval")
    active_BTF = np.vectorize(lambda x: eval(formula, vars(math) | {"x": float(x)}))(hidden_BTF)
    expected_BTD = active_BTF @ weights["c_proj"]["kernel"] + weights["c_proj"]["bias"]
    # 128 float32 products of numbers near 2 and 0.2.
    np.testing.assert_allclose(actual_BTD, expected_BTD, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gelu_new_has_the_derivative_of_its_formula(dtype):
    x = jnp.concatenate([jnp.linspace(-12, 12, 2401), jnp.asarray([-1e4, 1e4])]).astype(dtype)
    gelu_new = ACTIVATIONS["gelu_new"]
    gradient = jax.vmap(jax.grad(gelu_new))(x)
    assert gradient.dtype == dtype
    with jax.enable_x64():
        y = jnp.asarray(np.asarray(x, np.float64))
        expected = jax.vmap(jax.grad(lambda y: jax.nn.gelu(y, approximate=True)))(y)
    # Rounded to 24 (8) significant bits; values are at most 1.13. Plain autodiff misses by 3.6e-6.
    tolerance = 5e-7 if dtype == jnp.float32 else 2**-8
    np.testing.assert_allclose(np.asarray(gradient, np.float64), expected, rtol=0, atol=tolerance)
    _, forward_mode = jax.jvp(gelu_new, (x,), (jnp.ones_like(x),))
    np.testing.assert_allclose(forward_mode, expected, rtol=0, atol=5e-7)


def test_gelu_new_leaves_its_input_alone_to_the_backward_pass():
    x = jnp.ones((4, 8), jnp.bfloat16)
    _, backward = jax.vjp(ACTIVATIONS["gelu_new"], x)
    kept = [leaf for leaf in jax.tree.leaves(backward) if leaf.size > 1]
    assert [(leaf.shape, leaf.dtype) for leaf in kept] == [(x.shape, x.dtype)]


def pad_vocabulary(params, rows):
    table_VD = params["wte"]["embedding"]
    padding = ((0, rows - table_VD.shape[0]), (0, 0))
    return params | {"wte": {"embedding": jnp.pad(table_VD, padding)}}


def test_vocabulary_padding_never_shows(shallow_config, shallow_params):
    config = dataclasses.replace(shallow_config, pad_vocab_size_multiple=64)
    logits_BTV = apply(config, pad_vocabulary(shallow_params, 128), TOKENS_BT)
    assert logits_BTV.shape == (3, 8, 97)
    # A wider matrix may be summed in another order.
    expected_BTV = apply(shallow_config, shallow_params, TOKENS_BT)
    np.testing.assert_allclose(logits_BTV, expected_BTV, rtol=0, atol=2e-5)


def test_padded_rows_get_no_gradient(shallow_config, shallow_params):
    config = dataclasses.replace(shallow_config, pad_vocab_size_multiple=64)
    params = pad_vocabulary(shallow_params, 128)

    def loss(params):
        return jnp.square(jax.nn.log_softmax(apply(config, params, TOKENS_BT))).sum()

    gradient_VD = jax.jit(jax.grad(loss))(params)["wte"]["embedding"]
    assert gradient_VD.shape == (128, 32)
    assert not np.any(gradient_VD[97:])
    assert np.all(np.any(gradient_VD[:97], axis=1))


def test_initial_weights_have_the_papers_statistics(tiny_config):
    params = init(tiny_config, jax.random.key(7))
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        if path.endswith("bias"):
            assert not np.any(leaf), path
        elif path.endswith("scale"):
            assert np.all(leaf == 1), path
        else:
            expected = 0.02 / math.sqrt(2 * tiny_config.n_layer) if "c_proj" in path else 0.02
            # Five standard errors of a normal sample's deviation, and of its mean.
            assert abs(np.std(leaf) / expected - 1) < 5 / math.sqrt(2 * leaf.size), path
            assert abs(np.mean(leaf)) < 5 * expected / math.sqrt(leaf.size), path


def test_initial_weights_follow_the_key_and_differ_between_layers(tiny_config):
    first, again, other = (init(tiny_config, jax.random.key(seed)) for seed in (0, 0, 1))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, again))
    assert not np.array_equal(first["wte"]["embedding"], other["wte"]["embedding"])
    layers = [first[name]["attn"]["c_attn"]["kernel"] for name in ("h_0", "h_1")]
    assert not np.array_equal(*layers)


@pytest.mark.parametrize("place", ["embd_pdrop", "attn_pdrop", "resid_pdrop"])
def test_dropout_is_random_only_when_asked_for(shallow_config, shallow_params, place):
    config = dataclasses.replace(shallow_config, **{place: 0.5})

    def dropped(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return apply(config, shallow_params, TOKENS_BT, deterministic=False, rngs=rngs)

    np.testing.assert_array_equal(dropped(0), dropped(0))
    assert not np.array_equal(dropped(0), dropped(1))
    # Without a key nothing can be random: it must be asked for, and is not by default.
    run = functools.partial(apply, config, shallow_params, TOKENS_BT)
    assert jax.eval_shape(run).shape == (3, 8, 97)
    with pytest.raises(flax.errors.InvalidRngError):
        jax.eval_shape(functools.partial(run, deterministic=False))


def test_a_sequence_longer_than_the_context_is_refused(tiny_config, tiny_params):
    run = functools.partial(apply, tiny_config, tiny_params)
    assert jax.eval_shape(run, np.zeros((1, 32), np.int32)).shape == (1, 32, 97)
    with pytest.raises(ValueError, match="33 tokens do not fit n_positions=32"):
        run(np.zeros((1, 33), np.int32))


def test_a_token_outside_the_vocabulary_gives_nan_not_another_token(tiny_config, tiny_params):
    tokens_BT = TOKENS_BT.copy()
    tokens_BT[0, -1] = 97
    logits_BTV = apply(tiny_config, tiny_params, tokens_BT)
    assert np.isnan(logits_BTV[0, -1]).all()
    assert np.isfinite(logits_BTV[1:]).all()
