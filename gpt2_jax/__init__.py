"""GPT-2 in functional JAX.

The names below are loaded when first used, so that scripts answer `--help` without importing jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2_jax.config import SIZES, GPT2Config
    from gpt2_jax.errors import UserError
    from gpt2_jax.generation.decode import NewToken, generate, stream
    from gpt2_jax.generation.sampling import Sampling
    from gpt2_jax.interop.pretrained import load_pretrained
    from gpt2_jax.model import GPT2, Params, apply, init_params
    from gpt2_jax.packed import PackedParams, pack

_HOMES = {
    "GPT2": "model",
    "GPT2Config": "config",
    "NewToken": "generation.decode",
    "PackedParams": "packed",
    "Params": "model",
    "SIZES": "config",
    "Sampling": "generation.sampling",
    "UserError": "errors",
    "apply": "model",
    "generate": "generation.decode",
    "init_params": "model",
    "load_pretrained": "interop.pretrained",
    "pack": "packed",
    "stream": "generation.decode",
}

__all__ = [
    "GPT2",
    "SIZES",
    "GPT2Config",
    "NewToken",
    "PackedParams",
    "Params",
    "Sampling",
    "UserError",
    "apply",
    "generate",
    "init_params",
    "load_pretrained",
    "pack",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
