"""The gradient of one loss, parameter by parameter, in JAX and in PyTorch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.typing import DTypeLike

from gpt2_jax.config import GPT2Config
from gpt2_jax.interop.huggingface import state_dict_from_params
from gpt2_jax.model import GPT2, Params
from gpt2_jax.training.step import batch_loss
from parity.models import Models
from parity.outcomes import Check, bounded_each, relative_error
from parity.rounding import allowed_errors, to_numpy

FLOOR = {"float32": 1e-5, "bfloat16": 1e-2}
"""Relative error of a parameter's gradient that is always allowed, ||ours - theirs|| / ||theirs||,
by compute dtype."""

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
    theirs = {
        "Hugging Face": torch_gradients(models.huggingface, tokens_BT),
        "reference": torch_gradients(models.reference, tokens_BT),
    }
    errors = {
        # Nearest to the loss first, since from there a fault spreads.
        model: {weight: relative_error(ours[weight], grads[weight]) for weight in reversed(grads)}
        for model, grads in theirs.items()
    }
    allowed = dict.fromkeys(ours, FLOOR[name])
    if not all(error <= FLOOR[name] for found in errors.values() for error in found.values()):
        allowed = allowed_errors(
            models.huggingface,
            lambda model: torch_gradients(model, tokens_BT),
            name,
            FLOOR[name],
            backwards=True,
        )
    return [
        bounded_each(f"gradients, JAX - {model}", found, ours, allowed, name)
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
    return named(grads, config)


def named(tree: Params, config: GPT2Config) -> dict[str, np.ndarray]:
    """A tree like the parameters' under Hugging Face's names, a tied head once."""
    state = state_dict_from_params(tree, config)
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def torch_gradients(model: torch.nn.Module, tokens_BT: np.ndarray) -> Gradients:
    """The same of a PyTorch model in eval mode; its own gradients are left as they were."""
    tokens = torch.from_numpy(np.asarray(tokens_BT, np.int64))
    logits_BTV = model(tokens[:, :-1])
    logits_BTV = getattr(logits_BTV, "logits", logits_BTV)  # Hugging Face wraps them
    loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens[:, 1:].flatten())
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters)
    return {name: to_numpy(grad) for name, grad in zip(names, grads, strict=True)}
