"""The gradient of one loss, parameter by parameter, in JAX and in PyTorch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.typing import DTypeLike

from gpt2_jax.config import GPT2Config
from gpt2_jax.interop.huggingface import stored_state_dict
from gpt2_jax.model import GPT2, Params
from gpt2_jax.training.step import batch_loss
from parity.models import Models
from parity.outcomes import Check, bounded_each
from parity.rounding import relative_errors, to_numpy

Gradients = dict[str, np.ndarray]


def check_gradients(
    models: Models, tokens_BT: np.ndarray, dtype: DTypeLike = jnp.float32
) -> list[Check]:
    """Gradients of JAX against both PyTorch models, which compute in float32.

    Args:
      models: the models.
      tokens_BT: token ids [B, T + 1]; the loss is that of the next token, without dropout.
      dtype: what JAX computes in.
    """
    name = jnp.dtype(dtype).name
    ours = jax_gradients(models.params, models.config, tokens_BT, dtype)
    _, errors, allowed = relative_errors(
        ours, models, lambda model: torch_gradients(model, tokens_BT), name, backwards=True
    )
    return [
        # Nearest to the loss first, since from there a fault spreads.
        bounded_each(
            f"gradients, JAX - {model}", dict(reversed(found.items())), ours, allowed, name
        )
        for model, found in errors.items()
    ]


def without_dropout(config: GPT2Config) -> GPT2Config:
    """The same architecture with nothing left to chance."""
    return dataclasses.replace(config, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)


def jax_gradients(
    params: Params, config: GPT2Config, tokens_BT: np.ndarray, dtype: DTypeLike = jnp.float32
) -> Gradients:
    """Gradients of the training loss under Hugging Face's names."""
    model = GPT2(without_dropout(config), dtype=dtype)
    gradient = jax.jit(jax.grad(functools.partial(batch_loss, model=model)))
    grads = gradient(params, jnp.asarray(tokens_BT, jnp.int32), jax.random.key(0))
    return stored_state_dict(grads, config)


def torch_gradients(model: torch.nn.Module, tokens_BT: np.ndarray) -> Gradients:
    """The same of a PyTorch model in eval mode; its own gradients are left as they were."""
    tokens = torch.from_numpy(np.asarray(tokens_BT, np.int64))
    logits_BTV = model(tokens[:, :-1])
    logits_BTV = getattr(logits_BTV, "logits", logits_BTV)  # Hugging Face wraps them
    loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens[:, 1:].flatten())
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters)
    return {name: to_numpy(grad) for name, grad in zip(names, grads, strict=True)}
