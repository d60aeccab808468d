"""How far rounding alone may take two models apart.

Large weights amplify rounding from layer to layer, so no one bound suits all models. Where a
difference is above its floor, Hugging Face's own model tells how much is rounding: by how far it
is, in the same dtype, from itself in float64. A fault smaller than that can hide in such a model;
in weights as they are initialised the same fault cannot.
"""

import copy
import math
from collections.abc import Callable

import numpy as np
import torch

from parity.outcomes import relative_error

FACTOR = {"float32": 10.0, "bfloat16": 2.0}
"""How many times Hugging Face's own rounding is allowed, by compute dtype. In bfloat16 JAX rounds
less often than a PyTorch model that is bfloat16 throughout, so there it is less."""


CAP = {"float32": 0.1, "bfloat16": 1.0}
"""What is never allowed: so far off, one cannot tell rounding from a fault."""


def allowed_errors(
    model: torch.nn.Module,
    compute: Callable[[torch.nn.Module], dict[str, np.ndarray]],
    dtype: str,
    floor: float,
    *,
    backwards: bool = False,
) -> dict[str, float]:
    """The relative error that is allowed of each thing a model computes.

    Args:
      model: float32, Hugging Face's.
      compute: what it computes, by name, in the order of computation.
      dtype: what the model it is compared with computes in.
      floor: allowed in any case.
      backwards: whether it is computed from the last to the first.
    """
    rounding = own_rounding(model, compute, dtype)
    allowed, reached = {}, 0.0
    for name in reversed(rounding) if backwards else rounding:
        # Relative to an exact zero, any rounding is infinite: that tells nothing of the rest.
        reached = max(reached, rounding[name] if math.isfinite(rounding[name]) else 0.0)
        allowed[name] = min(CAP[dtype], max(floor, FACTOR[dtype] * reached))
    return allowed


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
