"""LoRA (Hu et al., 2021): linear layers changed by a product of two narrow matrices.

    y = x (W + scaling A B) + b        scaling = alpha / R, with rsLoRA alpha / sqrt(R)

An adapter is a pytree of its own, named as the parameters beside which it lies; those keep
their shape and their values:

    h_0/attn/c_attn/{lora_a [D, R], lora_b [R, 3D]}

`adapt` puts an adapter beside its base, to train it or to measure; `merge` adds it into the
weights, so that nothing is left to compute beside them.

Shapes: R rank, I and O the width of a layer's input and output.
"""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from gpt2_jax.config import GPT2Config
from gpt2_jax.lora_settings import LoraSettings, adapted_layers, widths
from gpt2_jax.model import AdaptedParams, Params
from gpt2_jax.precision import einsum

Lora = dict[str, Any]


def lora_shapes(config: GPT2Config, settings: LoraSettings) -> Lora:
    """The adapter's tree with `jax.ShapeDtypeStruct` leaves, all float32.

    Raises:
      UserError: if a target is no layer of the model.
    """
    sizes, flat = widths(config), {}
    for layer in adapted_layers(config, settings):
        rank, (width_in, width_out) = settings.rank_of(layer), sizes[layer.partition(".")[2]]
        flat[f"{layer}.lora_a"] = jax.ShapeDtypeStruct((width_in, rank), jnp.float32)
        flat[f"{layer}.lora_b"] = jax.ShapeDtypeStruct((rank, width_out), jnp.float32)
    return traverse_util.unflatten_dict(flat, sep=".")


def init_lora(config: GPT2Config, settings: LoraSettings, key: jax.Array) -> Lora:
    """Draws an adapter that changes nothing yet: B is zero.

    A is uniform between -1/sqrt(I) and 1/sqrt(I), as PEFT has it (`nn.Linear`'s own, He et al.,
    2015, with a = sqrt(5)). A layer's draw depends on the key and its name alone.

    Raises:
      UserError: if a target is no layer of the model.
    """
    flat = {}
    for path, leaf in traverse_util.flatten_dict(lora_shapes(config, settings), sep=".").items():
        if path.endswith("lora_b"):
            flat[path] = jnp.zeros(leaf.shape, leaf.dtype)
        else:
            layer_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
            bound = 1 / math.sqrt(leaf.shape[0])
            flat[path] = jax.random.uniform(
                layer_key, leaf.shape, leaf.dtype, minval=-bound, maxval=bound
            )
    return traverse_util.unflatten_dict(flat, sep=".")


def adapt(params: Params, lora: Lora, settings: LoraSettings) -> AdaptedParams:
    """Puts an adapter beside its base, as `gpt2_jax.model.apply` takes them.

    Args:
      params: the base, bare.
      lora: of `lora_shapes(config, settings)`.
      settings: those of the adapter; B is multiplied by `scaling` here.
    """
    flat = traverse_util.flatten_dict(lora, sep=".")
    for path in flat:
        layer, _, matrix = path.rpartition(".")
        if matrix == "lora_b":
            flat[path] = settings.scaling(layer) * flat[path]
    return AdaptedParams(params, traverse_util.unflatten_dict(flat, sep="."))


def merged(params: AdaptedParams) -> Params:
    """Adds what `adapt` put beside the parameters into them: W + A B, formula (3) of the paper.

    Layers without an adapter are shared with the base.
    """
    return _add(1.0, params)


def merge(params: Params, lora: Lora, settings: LoraSettings) -> Params:
    """Adds an adapter into the parameters: W + scaling A B.

    Args:
      params: the base; it stays as it is, and layers without an adapter are shared with it.
      lora: float32, of `lora_shapes(config, settings)`.
      settings: those of the adapter.

    Returns:
      Parameters of the same tree, with which the plain model computes what the adapted one does.
    """
    return merged(adapt(params, lora, settings))


def unmerge(params: Params, lora: Lora, settings: LoraSettings) -> Params:
    """Takes an adapter out again: the base that it was merged into, but for rounding.

    Arguments and result as for `merge`.
    """
    return _add(-1.0, adapt(params, lora, settings))


def _add(sign: float, adapted: AdaptedParams) -> Params:
    params = traverse_util.flatten_dict(adapted.params, sep=".")
    factors = traverse_util.flatten_dict(adapted.lora, sep=".")
    for layer in dict.fromkeys(name.rpartition(".")[0] for name in factors):
        a_IR, b_RO = factors[f"{layer}.lora_a"], factors[f"{layer}.lora_b"]
        change_IO = einsum("IR,RO->IO", a_IR, b_RO, jnp.float32)
        params[f"{layer}.kernel"] = params[f"{layer}.kernel"] + sign * change_IO
    return traverse_util.unflatten_dict(params, sep=".")
