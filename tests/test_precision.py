"""The precision policy: what is rounded to 16 bits, what is not, and how far that strays."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import gpt2_jax
from gpt2_jax.model import GPT2
from gpt2_jax.precision import einsum
from gpt2_jax.training.step import batch_loss

PACKAGE = Path(gpt2_jax.__path__[0])
# Attention puts the letters of its heads, one axis or two, in front of all three terms.
SPECS = sorted(
    {
        re.sub("{heads}", heads, spec)
        for file in PACKAGE.rglob("*.py")
        for spec in re.findall(r'einsum\(\s*f?"([^"]+->[^"]+)"', file.read_text("utf-8"))
        for heads in ("BH", "N")
    }
)
ODD_SIZES = (1, 7, 33, 5, 3)


def rounded(array):
    """The bfloat16 values of an array, in float64."""
    return np.asarray(array).astype(ml_dtypes.bfloat16).astype(np.float64)


def operands_and_gradient(spec, offset):
    """Random float32 operands of odd sizes, and a gradient of the result."""
    left, right, out = re.split(",|->", spec)
    letters = sorted(set(left + right))
    size = {letter: ODD_SIZES[(i + offset) % len(ODD_SIZES)] for i, letter in enumerate(letters)}
    rng = np.random.default_rng(offset)
    return [
        rng.normal(size=[size[letter] for letter in term]).astype(np.float32)
        for term in (left, right, out)
    ]


def relative_error(actual, expected):
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)


def test_the_package_has_products_to_test():
    assert {"BTD,DF->BTF", "BTD,FD->BTF", "BHTK,BHSK->BHTS", "NTS,NSK->NTK"} <= set(SPECS)
    assert all(re.fullmatch("[A-Z]+,[A-Z]+->[A-Z]+", spec) for spec in SPECS)


@pytest.mark.parametrize("offset", [0, 1, 2])
@pytest.mark.parametrize("spec", SPECS)
def test_products_round_their_operands_once_and_nothing_else(spec, offset):
    """Forward and backward equal float64 products of the rounded operands."""
    left, right, out = re.split(",|->", spec)
    x, y, gradient = operands_and_gradient(spec, offset)
    product, pull_back = jax.vjp(lambda x, y: einsum(spec, x, y, jnp.bfloat16), x, y)
    gradient_x, gradient_y = pull_back(gradient)

    # Sums of at most 7 * 33 * 33 products in float32, whose last bit is 6e-8.
    bound = 2e-6
    x16, y16, gradient16 = rounded(x), rounded(y), rounded(gradient)
    assert relative_error(product, np.einsum(spec, x16, y16)) < bound
    expected_x = np.einsum(f"{out},{right}->{left}", gradient16, y16)
    expected_y = np.einsum(f"{left},{out}->{right}", x16, gradient16)
    assert relative_error(gradient_x, expected_x) < bound
    assert relative_error(gradient_y, expected_y) < bound

    # Rounding two operands to 8 significant bits moves each by at most 2^-9, the product by twice
    # that, and errors of many terms partly cancel.
    exact_x = np.einsum(f"{out},{right}->{left}", gradient.astype(np.float64), y)
    assert relative_error(gradient_x, exact_x) < 2**-8


@pytest.mark.parametrize("spec", SPECS)
def test_float32_products_are_not_rounded(spec):
    x, y, _ = operands_and_gradient(spec, 1)
    expected = np.einsum(spec, x.astype(np.float64), y.astype(np.float64))
    assert relative_error(einsum(spec, x, y, jnp.float32), expected) < 2e-6


def test_float32_products_ask_for_float32_forward_and_backward():
    """Left to choose, a GPU would take TensorFloat-32, with the 11 significant bits of float16."""

    def total(x, y):
        return jnp.square(einsum("BTD,DF->BTF", x, y, jnp.float32)).sum()

    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))
    program = gradients.lower(jnp.ones((2, 3, 5)), jnp.ones((5, 7))).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) == 3
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


@pytest.mark.parametrize("compute", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_results_are_float32_and_gradients_have_their_operands_dtype(compute, dtypes):
    x, y = jnp.ones((1, 3, 5), dtypes[0]), jnp.ones((5, 7), dtypes[1])

    def total(x, y):
        product = einsum("BTD,DF->BTF", x, y, compute)
        assert product.dtype == jnp.float32
        return product.sum()

    grads = jax.eval_shape(jax.grad(total, argnums=(0, 1)), x, y)
    assert tuple(grad.dtype.name for grad in grads) == dtypes


def test_bfloat16_strays_little_from_float32_over_the_whole_model(shallow_config, shallow_params):
    tokens_BT = np.random.default_rng(2).integers(0, 97, (2, 9)).astype(np.int32)

    def lower(dtype):
        def loss(params):
            key = jax.random.key(0)
            return batch_loss(params, tokens_BT, key, model=GPT2(shallow_config, dtype=dtype))

        return jax.jit(jax.value_and_grad(loss)).lower(shallow_params)

    lowered, lowered16 = lower(jnp.float32), lower(jnp.bfloat16)
    # One float32 operand would make a product float32, at a fraction of the speed.
    products = re.findall(r"stablehlo.dot_general.*: (\(.*\)) -> (.*)", lowered16.as_text())
    assert products
    for operands, result in products:
        assert operands.count("xbf16>") == 2, operands
        assert result.endswith("xf32>"), result

    (loss, grads), (loss16, grads16) = (
        program.compile()(shallow_params) for program in (lowered, lowered16)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(grads16)} == {jnp.dtype(jnp.float32)}
    flat, flat16 = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (grads, grads16)
    )
    # One rounding to bfloat16 errs by up to 2^-9 = 0.2 %. A gradient passes some dozen of them on
    # its way, whose errors add up like a random walk: a little below 1 %.
    assert relative_error(flat16, flat) < 0.02
    # Errors of the single losses have either sign and average out over 16 targets.
    assert abs(loss16 - loss) < 0.01
