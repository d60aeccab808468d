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

from parity.models import Models
from parity.outcomes import relative_error

Arrays = dict[str, np.ndarray]
Compute = Callable[[torch.nn.Module], Arrays]

FACTOR = {"float32": 10.0, "bfloat16": 2.0}
"""How many times Hugging Face's own rounding is allowed, by compute dtype. In bfloat16 JAX rounds
less often than a PyTorch model that is bfloat16 throughout, so there it is less."""


FLOOR = {"float32": 1e-5, "bfloat16": 1e-2}
"""Relative error that is always allowed, ||ours - theirs|| / ||theirs||, by compute dtype: some
hundred units in the last place of float32, three of bfloat16."""
CAP = {"float32": 0.1, "bfloat16": 1.0}
"""What is never allowed: so far off, one cannot tell rounding from a fault."""


def relative_errors(
    ours: Arrays, models: Models, compute: Compute, dtype: str, *, backwards: bool = False
) -> tuple[dict[str, Arrays], dict[str, dict[str, float]], dict[str, float]]:
    """What both PyTorch models compute in float32, how far JAX is from it, and how far it may be.

    Args:
      ours: what JAX computed, by name.
      models: the models.
      compute: the same of a PyTorch model, in the order of computation.
      dtype: what JAX computed in.
      backwards: whether it is computed from the last to the first.

    Returns:
      Their arrays and the relative errors, under the two models' names, and the errors allowed.
    """
    theirs = {
        "Hugging Face": compute(models.huggingface),
        "reference": compute(models.reference),
    }
    errors = {
        model: {name: relative_error(ours[name], array) for name, array in arrays.items()}
        for model, arrays in theirs.items()
    }
    floor = FLOOR[dtype]
    if all(error <= floor for found in errors.values() for error in found.values()):
        return theirs, errors, dict.fromkeys(ours, floor)
    return theirs, errors, _allowed(models.huggingface, compute, dtype, backwards)


def _allowed(
    model: torch.nn.Module, compute: Compute, dtype: str, backwards: bool
) -> dict[str, float]:
    rounding = own_rounding(model, compute, dtype)
    allowed, reached = {}, 0.0
    for name in reversed(rounding) if backwards else rounding:
        # Relative to an exact zero, any rounding is infinite: that tells nothing of the rest.
        reached = max(reached, rounding[name] if math.isfinite(rounding[name]) else 0.0)
        allowed[name] = min(CAP[dtype], max(FLOOR[dtype], FACTOR[dtype] * reached))
    return allowed


def own_rounding(model: torch.nn.Module, compute: Compute, dtype: str) -> dict[str, float]:
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
