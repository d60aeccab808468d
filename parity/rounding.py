"""How far rounding alone may take two models apart.

Large weights amplify rounding from layer to layer, so no one bound suits all models. Where a
difference is above its floor, Hugging Face's own model tells how much is rounding: by how far it
is, in the same dtype, from itself in float64.
"""

import copy
from collections.abc import Callable

import numpy as np
import torch

from parity.outcomes import relative_error

FACTOR = {"float32": 10.0, "bfloat16": 2.0}
"""How many times Hugging Face's own rounding is allowed, by compute dtype. In bfloat16 JAX rounds
less often than a PyTorch model that is bfloat16 throughout, so there it is less."""


def own_rounding(
    model: torch.nn.Module,
    compute: Callable[[torch.nn.Module], dict[str, np.ndarray]],
    dtype: str,
) -> dict[str, float]:
    """Relative error, against float64, of everything a float32 PyTorch model computes.

    Args:
      model: its parameters are float64 for a while, and then the same as before.
      compute: what it computes, by name.
      dtype: what the model computes in: "float32" or "bfloat16".
    """
    narrow = model if dtype == "float32" else copy.deepcopy(model).to(getattr(torch, dtype))
    rounded = compute(narrow)
    try:
        exact = compute(model.double())
    finally:
        model.float()
    return {name: relative_error(rounded[name], array) for name, array in exact.items()}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as numpy has it: bfloat16 becomes float32."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)).numpy()
