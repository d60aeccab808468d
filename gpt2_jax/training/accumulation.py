"""Sums over the parts of something too large to be computed at once."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

Total = TypeVar("Total")
Each = TypeVar("Each")
Part = TypeVar("Part")


def accumulate(function: Callable[[Part], tuple[Total, Each]], parts: Part) -> tuple[Total, Each]:
    """Applies a function to one part after another; only one is in memory at a time.

    Args:
      function: of a part to a tree of arrays to add up, and a tree to keep.
      parts: a tree of arrays whose first axis is that of the parts.

    Returns:
      The sums, and what is kept of all parts, stacked.
    """
    first = jax.tree.map(lambda array: array[0], parts)
    if len(jax.tree.leaves(parts)[0]) == 1:
        # No loop, and no zeros to add to: for gradients these are two passes over memory.
        total, each = function(first)
        return total, jax.tree.map(lambda array: array[None], each)

    def add(total: Total, part: Part) -> tuple[Total, Each]:
        result, each = function(part)
        return jax.tree.map(jnp.add, total, result), each

    like, _ = jax.eval_shape(function, first)
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    return jax.lax.scan(add, zero, parts)
