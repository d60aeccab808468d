"""The precision policy, stated and enforced here and nowhere else.

- Parameters, gradients and optimizer state are float32.
- Compute is bfloat16 or float32, the model's `dtype`. Operands of every matrix product are
  rounded to it once; the product accumulates in float32, forward and backward.
- What a linear layer returns is rounded to the compute dtype. All that is not a product is
  float32: the residual stream, layer norms, nonlinearities, softmax, logits and the loss. That
  is what PyTorch's autocast does, but for its nonlinearities.
- Weights may be stored in fewer bits for generation alone, see `gpt2_jax.packed`.
- float32 means float32: GPUs must not round it to TensorFloat-32 behind the user's back.
"""

import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Tree = TypeVar("Tree")


def round_kernels(params: Tree, dtype: DTypeLike) -> Tree:
    """The parameters with their kernels already in the compute dtype, for use again and again.

    Nothing that is computed changes. Tables stay: an embedding is added in float32.
    """

    def rounded(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        is_kernel = getattr(path[-1], "key", None) == "kernel"
        return leaf.astype(dtype) if is_kernel else leaf

    return jax.tree_util.tree_map_with_path(rounded, params)


def einsum(spec: str, x: jax.Array, y: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Two-operand `jnp.einsum` under the precision policy.

    Args:
      spec: such as "BTD,DF->BTF". Every letter stands in two of the three terms, or in all.
      x: left operand, any float dtype.
      y: right operand, any float dtype (a float32 parameter, usually).
      dtype: compute dtype both operands are rounded to before they are multiplied.

    Returns:
      The product in float32. Gradients have the dtype of the operand they belong to.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return jnp.einsum(spec, x, y, precision="highest", preferred_element_type=jnp.float32)
    return _einsum_16_bit(spec, dtype, x, y)


# Left to itself, autodiff multiplies the float32 gradient of a float32 result with 16-bit
# operands, which promotes the whole backward product to float32. Rounding the gradient first
# keeps all three products in 16 bits, and the weight's gradient is never rounded at all.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _einsum_16_bit(spec: str, dtype: DTypeLike, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32)


def _einsum_forward(spec, dtype, x, y):  # type: ignore[no-untyped-def]
    rounded_x, rounded_y = x.astype(dtype), y.astype(dtype)
    product = jnp.einsum(spec, rounded_x, rounded_y, preferred_element_type=jnp.float32)
    # Empty arrays carry the operands' own dtypes to the backward pass.
    return product, (rounded_x, rounded_y, jnp.empty(0, x.dtype), jnp.empty(0, y.dtype))


def _einsum_backward(spec, dtype, residuals, gradient):  # type: ignore[no-untyped-def]
    rounded_x, rounded_y, like_x, like_y = residuals
    operands, out = spec.split("->")
    left, right = operands.split(",")
    gradient = gradient.astype(dtype)
    multiply = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    gradient_x = multiply(f"{out},{right}->{left}", gradient, rounded_y)
    gradient_y = multiply(f"{left},{out}->{right}", rounded_x, gradient)
    return gradient_x.astype(like_x.dtype), gradient_y.astype(like_y.dtype)


_einsum_16_bit.defvjp(_einsum_forward, _einsum_backward)
