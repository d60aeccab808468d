"""Packed weights: smaller, laid out for decoding, and the same model up to a known rounding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from gpt2_jax.benchmarks.rounding import rounding_cost
from gpt2_jax.config import SIZES, GPT2Config
from gpt2_jax.data.text import python_documentation
from gpt2_jax.errors import UserError
from gpt2_jax.model import GPT2, apply, init_params, param_shapes
from gpt2_jax.packed import PackedByInputs, PackedMatrix, PackedParams, pack, project, rows
from gpt2_jax.packed_words import PackedWords, unpack
from gpt2_jax.training.step import batch_loss

PRECISIONS = ("f32", "bf16", "int8")
TOKENS_BT = np.random.default_rng(6).integers(0, 97, (2, 9)).astype(np.int32)
# Inputs that fill the words of a vector register, and some that do not.
SHAPES_FD = [(96, 32), (5, 768), (3, 3072), (2, 1600), (2, 6400), (7, 33), (1, 1)]


def matrix(weight_FD, precision, together=1):
    """A matrix packed as a model's output head is, for so many rows together."""
    table = {"wte": {"embedding": jnp.asarray(weight_FD)}}
    return pack(table, precision, rows=together).packed["wte"]["embedding"]


def random_matrix(outputs, inputs, precision, together=1):
    weight_FD = np.random.default_rng(outputs).normal(size=(outputs, inputs))
    return matrix(weight_FD.astype(np.float32), precision, together)


def dequantised(packed, outputs, inputs):
    """The weights that a packed matrix stands for, in float64."""
    if isinstance(packed, PackedByInputs):
        return np.asarray(packed.weight_DF.T, np.float64)[:outputs]
    if isinstance(packed, PackedWords):
        packed = PackedMatrix(unpack(packed.words_FW, inputs))
    weight_FD = np.asarray(packed.weight_FD.astype(jnp.float32), np.float64)
    scale_F = 1.0 if packed.scale_F is None else np.asarray(packed.scale_F, np.float64)
    return (weight_FD * np.reshape(scale_F, (-1, 1)))[:outputs]


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.fixture(scope="module", params=["tied", "untied", "padded"])
def model_and_params(request, shallow_config, shallow_params):
    config, params = shallow_config, shallow_params
    if request.param == "untied":
        config = dataclasses.replace(config, tie_word_embeddings=False)
        params = {**params, "lm_head": {"embedding": params["wte"]["embedding"][::-1]}}
    elif request.param == "padded":
        config = dataclasses.replace(config, pad_vocab_size_multiple=100)
        padded_VD = jnp.pad(params["wte"]["embedding"], ((0, 3), (0, 0)), constant_values=9.0)
        params = {**params, "wte": {"embedding": padded_VD}}
    return GPT2(config), params


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_packed_model_is_the_same_up_to_rounding(model_and_params, precision, together):
    model, params = model_and_params
    before = jax.tree.map(np.array, params)
    packed = pack(params, precision, rows=together)
    assert isinstance(packed, PackedParams)
    assert packed.precision == precision
    jax.tree.map(np.testing.assert_array_equal, params, before)

    exact_BTV, packed_BTV = (apply(model, p, TOKENS_BT) for p in (params, packed))
    assert packed_BTV.shape == (2, 9, 97)
    error = np.linalg.norm(packed_BTV - exact_BTV) / np.linalg.norm(exact_BTV)
    # Rounding to 8 significant bits errs by 0.17 %, to 255 levels up to the largest of 32 normal
    # weights by 0.5 %; it is done to six matrices, one of them read twice.
    assert error < {"f32": 1e-6, "bf16": 0.01, "int8": 0.02}[precision]
    assert error > 1e-4 or precision == "f32"


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_only_tokens_of_the_vocabulary_have_rows(model_and_params, precision, together):
    """Tables are padded in packing, and may be before."""
    model, params = model_and_params
    outside = jnp.array([[-1, 97, 99, 100, 127, 128]])
    packed = pack(params, precision, rows=together)
    lookup = functools.partial(apply, model, packed, method=lambda model, t: model.wte(t))
    assert np.isnan(lookup(outside)).all()
    assert np.isfinite(lookup(jnp.array([[0, 96]]))).all()


def test_for_several_float32_rows_the_tables_alone_are_packed(tiny_params):
    packed = pack(tiny_params, rows=2)
    assert packed.precision == "f32"
    assert list(packed.packed) == ["wte"]
    for block in ("h_0", "h_1"):
        for kept, param in zip(
            *map(jax.tree.leaves, (packed.params[block], tiny_params[block])), strict=True
        ):
            assert kept is param


def test_precisions_are_those_there_are(tiny_params):
    with pytest.raises(UserError, match="precision='int4' must be one of f32, bf16, int8"):
        pack(tiny_params, "int4")


@pytest.mark.parametrize("together", [1, 2])
def test_sizes_follow_the_bits(together):
    """At the 124M shape: of 4 bytes a weight two are left, or one; vectors are next to nothing."""
    shapes = param_shapes(SIZES["gpt2"])
    full, half, quarter = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(packed))
        for packed in (
            jax.eval_shape(functools.partial(pack, precision=precision, rows=together), shapes)
            for precision in PRECISIONS
        )
    )
    assert full == pytest.approx(4 * SIZES["gpt2"].parameter_count, rel=0.001)  # a padded head
    assert half / full == pytest.approx(1 / 2, abs=0.005)
    assert quarter / full == pytest.approx(1 / 4, abs=0.008)


def test_size_is_that_of_all_arrays(tiny_params):
    packed = pack(tiny_params, "int8")
    assert packed.nbytes == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(packed))


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_int8_weights_are_at_most_half_a_level_off(scale, together):
    """Every output has levels of its own, from its largest weight down to minus that."""
    rng = np.random.default_rng(3)
    weight_FD = scale * rng.normal(size=(40, 96)) * np.logspace(-3, 3, 40)[:, None]
    weight_FD = weight_FD.astype(np.float32)
    weight_FD[7] = 0
    weight_FD[8, 1:] = 0
    packed = matrix(weight_FD, "int8", together)
    level_F = np.abs(weight_FD).max(axis=1).astype(np.float64) / 127
    rounded_FD = dequantised(packed, 40, 96)
    assert np.all(np.abs(rounded_FD - weight_FD) <= level_F[:, None] * (0.5 + 1e-4))
    levels_F = np.abs(rounded_FD).max(axis=1) / np.where(level_F > 0, level_F, 1)
    np.testing.assert_allclose(levels_F, np.where(np.arange(40) == 7, 0, 127), rtol=1e-6)


@pytest.mark.parametrize("inputs", [1, 33, 768, 3072])
def test_weights_are_the_same_in_words(inputs):
    alone, together = (random_matrix(3, inputs, "bf16", together) for together in (1, 2))
    assert isinstance(alone, PackedWords)
    assert isinstance(together, PackedMatrix)
    weight_FD = unpack(alone.words_FW, inputs)
    assert weight_FD.dtype == together.weight_FD.dtype == jnp.bfloat16
    np.testing.assert_array_equal(weight_FD, together.weight_FD)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_parameters_of_any_type_are_packed_as_float32(tiny_params, precision, together, dtype):
    narrow = jax.tree.map(lambda leaf: leaf.astype(dtype), tiny_params)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)
    packed, expected = (pack(params, precision, rows=together) for params in (narrow, wide))
    assert packed.precision == precision
    jax.tree.map(np.testing.assert_array_equal, packed.packed, expected.packed)


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_weight_that_is_no_number_shows(precision, together):
    weight_FD = np.ones((3, 64), np.float32)
    weight_FD[1, 5] = np.nan
    packed = matrix(weight_FD, precision, together)
    for T in (1, 2):
        y_F = project_compiled(jnp.ones((1, T, 64)), packed)[0, 0, :3]
        np.testing.assert_array_equal(np.isnan(y_F), [False, True, False])


@functools.partial(jax.jit, static_argnames="dtype")
def project_compiled(x_BTD, packed, dtype=jnp.float32):
    return project(x_BTD, packed, dtype)


@pytest.mark.parametrize("outlier", [1.0, 100.0])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES_FD)
def test_products_round_only_what_they_say(outputs, inputs, together, precision, outlier):
    """A single row takes another way than several, and the result is the same.

    Some of GPT-2's activations are a hundred times larger than the rest.
    """
    packed = random_matrix(outputs, inputs, precision, together)
    x_ND = np.random.default_rng(1).normal(size=(3, inputs)).astype(np.float32)
    x_ND[:, 0] *= outlier
    together_NF = project_compiled(x_ND[None], packed)[0]
    alone_NF = np.concatenate([project_compiled(x_D[None, None], packed)[0] for x_D in x_ND])

    if precision == "bf16":
        x_ND = x_ND.astype(ml_dtypes.bfloat16)
    x_ND, weight_FD = x_ND.astype(np.float64), dequantised(packed, outputs, inputs)
    expected_NF = x_ND @ weight_FD.T
    # Sums in float32 round each term many times, by 2^-25 on average and in either direction.
    bound_NF = 2**-20 * (np.abs(x_ND) @ np.abs(weight_FD).T)
    # Written in steps and rounded to the nearest, at worst all activations are off by half a step
    # in the direction of their weights. A step is the 127 * 254th part of the largest, or what
    # sums of 32 bits need.
    size_ND = np.abs(x_ND)
    step_N = np.maximum(size_ND.max(axis=1) / (127 * 254), 127 * size_ND.sum(axis=1) / 2**31)
    steps_NF = 0.501 * step_N[:, None] * np.abs(weight_FD).sum(axis=1)
    for y_NF in (together_NF, alone_NF):
        assert not np.any(y_NF[:, outputs:])
        error_NF = np.abs(y_NF[:, :outputs] - expected_NF)
        assert np.all(error_NF <= bound_NF + (precision == "int8") * steps_NF)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("count", [1, 8, 9])
def test_sums_of_whole_numbers_do_not_overflow(count, sign):
    """The worst there is: all weights and all activations are the largest."""
    packed = matrix(np.full((3, 6400), 0.7, np.float32), "int8")
    y_F = project_compiled(jnp.full((1, count, 6400), sign * 0.9), packed)[0, 0, :3]
    np.testing.assert_allclose(y_F, sign * 6400 * 0.7 * 0.9, rtol=1e-3)


@pytest.mark.parametrize("T", [1, 8, 9])
def test_int8_keeps_small_activations_beside_large_ones(T):
    """Eight bits alone would round all but the largest to zero."""
    packed = random_matrix(64, 256, "int8")
    weight_FD = dequantised(packed, 64, 256)
    x_1TD = np.full((1, T, 256), 0.01, np.float32)
    x_1TD[..., 7] = 3.0
    y_F = project_compiled(x_1TD, packed)[0, 0]
    x_1TD[..., 7] = 0.0
    small_F = x_1TD[0, 0].astype(np.float64) @ weight_FD.T
    error_F = y_F - 3.0 * weight_FD[:, 7] - small_F
    # 0.01 is 107.5 steps of 3 / (127 * 254), or 109.2 of 3 / 32767; up to half a step is lost.
    assert np.linalg.norm(error_F) < 0.006 * np.linalg.norm(small_F)


@pytest.mark.parametrize("T", [1, 2, 9])
@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_zeros_stay_zero(precision, together, T):
    nothing = matrix(np.zeros((3, 64), np.float32), precision, together)
    assert not np.any(project_compiled(jnp.ones((1, T, 64)), nothing))
    packed = random_matrix(3, 64, precision, together)
    assert not np.any(project_compiled(jnp.zeros((1, T, 64)), packed))


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_do_not_touch_each_other(precision, together):
    """A row that is finished may hold anything: its neighbours' products stay what they were."""
    packed = random_matrix(5, 64, precision, together)
    x_1TD = np.random.default_rng(0).normal(size=(1, 3, 64)).astype(np.float32)
    expected_1TF = np.asarray(project_compiled(x_1TD, packed))
    for junk in (np.nan, np.inf, 1e30):
        x_1TD[0, 1] = junk
        y_1TF = project_compiled(x_1TD, packed)
        np.testing.assert_array_equal(y_1TF[0, ::2], expected_1TF[0, ::2])


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_are_looked_up_and_nothing_is_outside_the_table(precision, together):
    packed = random_matrix(5, 8, precision, together)
    picked_12D = rows(packed, jnp.array([[4, 0]]), 8)
    assert picked_12D.dtype == jnp.float32
    np.testing.assert_allclose(picked_12D[0], dequantised(packed, 5, 8)[[4, 0]], rtol=1e-6)
    assert np.isnan(rows(packed, jnp.array([64, 10**6]), 8)).all()


def test_a_table_without_packing_is_read_as_it_is():
    table_VD = jnp.arange(6.0).reshape(3, 2)
    picked = rows(PackedMatrix(table_VD), jnp.array([2, 0]), 2)
    np.testing.assert_array_equal(picked, table_VD[jnp.array([2, 0])])


@pytest.fixture(scope="module")
def trained():
    """A model of characters, trained for some seconds, and text that it has not seen."""
    text = "".join(python_documentation()).encode("ascii", "replace")
    tokens = np.frombuffer(text, np.uint8).astype(np.int32)
    config = GPT2Config(
        vocab_size=128,
        n_positions=32,
        n_embd=64,
        n_layer=1,
        n_head=4,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        eos_token_id=None,
    )
    model, optimizer = GPT2(config), optax.adam(optax.linear_schedule(5e-3, 0.0, 200))

    @jax.jit
    def train(params, batches):
        def step(carry, tokens_BT):
            params, state = carry
            loss, grads = jax.value_and_grad(batch_loss)(
                params, tokens_BT, jax.random.key(0), model=model
            )
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), loss

        carry, losses = jax.lax.scan(step, (params, optimizer.init(params)), batches)
        return carry[0], losses

    cut = len(tokens) * 9 // 10
    starts = np.random.default_rng(0).integers(0, cut - 32, (200, 16, 1))
    params, losses = train(init_params(config, jax.random.key(0)), tokens[starts + np.arange(33)])
    assert losses[-20:].mean() < 2.7 < 4.5 < losses[0]
    return params, config, tokens[cut:]


@pytest.mark.slow
def test_rounding_costs_a_trained_model_next_to_nothing(trained):
    """On text that it has not seen; `docs/generate.md` has the figures of larger models."""
    costs = rounding_cost(*trained, limit=10_000)
    assert list(costs) == ["f32", "bf16", "int8"]
    exact = costs["f32"]
    assert exact["agreement"] == 1.0
    assert exact["loss"] == pytest.approx(np.log(exact["perplexity"]))
    for precision in ("bf16", "int8"):
        cost = costs[precision]
        # Noise of half a percent in each product moves logits of 5 by some 0.05, their losses in
        # either direction; a tenth of the places has two tokens within ten times that.
        assert abs(cost["loss"] - exact["loss"]) < 0.002
        assert 0.99 < cost["agreement"] < 1.0
    sizes = [costs[precision]["megabytes"] for precision in PRECISIONS]
    assert sizes[0] > 1.8 * sizes[1] > 3 * sizes[2]
