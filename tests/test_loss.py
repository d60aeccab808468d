"""From features to the mean loss, chunk by chunk: what the definition gives, and its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.precision import einsum
from gpt2_jax.training.accumulation import accumulate
from gpt2_jax.training.loss import Head, cross_entropy, head_loss, head_losses

VOCAB = 53
CHUNKS = [None, 1, 3, 7, 100]


def random_batch(rows=VOCAB, scale=1.0):
    """Features [2, 7, 16], a table of `rows`, targets."""
    rng = np.random.default_rng(5)
    x_BTD = jnp.asarray(rng.normal(size=(2, 7, 16)), jnp.float32)
    table_VD = jnp.asarray(scale * rng.normal(size=(rows, 16)), jnp.float32)
    return x_BTD, table_VD, jnp.asarray(rng.integers(0, VOCAB, (2, 7)), jnp.int32)


def plain_losses(x_BTD, table_VD, targets_BT, dtype):
    logits_BTV = einsum("BTD,VD->BTV", x_BTD, table_VD, dtype)[..., :VOCAB]
    return cross_entropy(logits_BTV, targets_BT)


def value_and_gradients(loss, batch):
    x_BTD, table_VD, targets_BT = batch
    # Not the loss itself: what comes after it scales its gradient.
    return jax.jit(
        jax.value_and_grad(lambda x, table: 3 * loss(x, table, targets_BT), argnums=(0, 1))
    )(x_BTD, table_VD)


@pytest.mark.parametrize("rows", [VOCAB, 64])
@pytest.mark.parametrize("positions", CHUNKS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_are_those_of_the_plain_form(dtype, positions, rows):
    batch, dtype = random_batch(rows), jnp.dtype(dtype)
    head = Head(VOCAB, dtype, positions)
    plain = value_and_gradients(lambda *batch: plain_losses(*batch, dtype).mean(), batch)
    chunked = value_and_gradients(lambda *batch: head_loss(*batch, head), batch)
    np.testing.assert_allclose(chunked[0], plain[0], rtol=2e-6)
    # Both round the same softmax to 16 bits before the products; its own last bit may differ.
    tolerance = 1e-6 if dtype == jnp.float32 else 4e-3
    for ours, expected in zip(chunked[1], plain[1], strict=True):
        assert ours.dtype == jnp.float32
        assert np.abs(ours - expected).max() <= tolerance * np.abs(expected).max()
    assert not np.any(chunked[1][1][VOCAB:])  # padding learns nothing


@pytest.mark.parametrize("positions", CHUNKS)
def test_losses_of_each_position_are_those_of_the_plain_form(positions):
    batch = random_batch(64)
    actual_BT = head_losses(*batch, Head(VOCAB, jnp.dtype(jnp.float32), positions))
    assert actual_BT.shape == (2, 7)
    np.testing.assert_allclose(actual_BT, plain_losses(*batch, jnp.float32), rtol=2e-6)


@pytest.mark.parametrize("padded", [False, True])
def test_a_gpus_copy_of_the_table_has_more_rows_and_the_same_results(monkeypatch, padded):
    batch, head = random_batch(64 if padded else VOCAB), Head(VOCAB, jnp.dtype(jnp.bfloat16), 3)
    expected = value_and_gradients(lambda *batch: head_loss(*batch, head), batch)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    actual = value_and_gradients(lambda *batch: head_loss(*batch, head), batch)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), actual, expected
    )


def test_huge_logits_have_finite_losses_and_gradients():
    batch = random_batch(scale=1e4)
    head = Head(VOCAB, jnp.dtype(jnp.float32), 2)
    loss, gradients = value_and_gradients(lambda *batch: head_loss(*batch, head), batch)
    assert np.isfinite(loss)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("spoilt", [0, 1])
def test_what_is_not_a_number_shows_in_the_loss(spoilt):
    batch = list(random_batch())
    batch[spoilt] = batch[spoilt].at[(0,) * batch[spoilt].ndim].set(jnp.nan)
    assert np.isnan(head_loss(*batch, Head(VOCAB, jnp.dtype(jnp.float32), 3)))


def test_chunks_hold_few_logits_and_no_gradient_is_a_scatter():
    batch = random_batch()
    gradient = jax.grad(lambda *batch: head_loss(*batch, Head(VOCAB, jnp.dtype("float32"), 1)))
    text = jax.jit(gradient).lower(*batch).as_text()
    assert "2x1x53xf32" in text
    assert "2x7x53x" not in text
    assert "scatter" not in text


@pytest.mark.parametrize("count", [1, 4])
def test_sums_and_what_is_kept_of_each_part(count):
    parts = jnp.arange(2.0 * count).reshape(count, 2)
    total, each = accumulate(lambda part: ({"sum": part}, part * part), parts)
    np.testing.assert_array_equal(total["sum"], parts.sum(axis=0))
    np.testing.assert_array_equal(each, parts**2)
