"""LoRA (Hu et al., 2021): linear layers changed by a product of two narrow matrices.

    y = x (W + scaling A B) + b        scaling = alpha / R, with rsLoRA alpha / sqrt(R)

An adapter is a pytree of its own, named as the parameters beside which it lies; those keep
their shape and their values:

    h_0/attn/c_attn/{lora_a [D, R], lora_b [R, 3D]}

Shapes: R rank, I and O the width of a layer's input and output.
"""

import dataclasses
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import traverse_util

from gpt2_jax.config import GPT2Config, check_positive_int, is_number
from gpt2_jax.errors import UserError
from gpt2_jax.model import Params
from gpt2_jax.precision import einsum

Lora = dict[str, Any]

TARGETS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
"""The linear layers of a block; any of them can be adapted."""

_Value = TypeVar("_Value")


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """Which layers an adapter changes, and how strongly; the defaults are PEFT's for GPT-2.

    Layers are named by their path with dots, "h_0.attn.c_attn". A shorter name stands for every
    layer that ends in it: "attn.c_attn" for one in each block, "c_proj" for two.

    Raises:
      UserError: if a value is out of its range.
    """

    targets: tuple[str, ...] = ("attn.c_attn",)
    """names of the layers to adapt"""
    rank: int = 8
    """R, the inner width of the two matrices"""
    alpha: float = 8.0
    """strength of the change, see `scaling`"""
    rs_lora: bool = False
    """rank-stabilised scaling (Kalajdzievski, 2023): divide by sqrt(R) instead of R"""
    rank_pattern: tuple[tuple[str, int], ...] = ()
    """(name, rank) of layers that have another rank; the first name that fits counts"""
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    """(name, alpha) of layers that have another alpha; the first name that fits counts"""

    def __post_init__(self) -> None:
        if not self.targets:
            raise UserError(f"targets is empty; give some of {', '.join(TARGETS)}")
        for rank in (self.rank, *(rank for _, rank in self.rank_pattern)):
            check_positive_int("rank", rank)
        for alpha in (self.alpha, *(alpha for _, alpha in self.alpha_pattern)):
            check_positive_number("alpha", alpha)

    def rank_of(self, layer: str) -> int:
        """R of a layer, given its full name."""
        return _first_fitting(self.rank_pattern, layer, self.rank)

    def scaling(self, layer: str) -> float:
        """The factor on A B in a layer: alpha / R, or alpha / sqrt(R)."""
        alpha, rank = _first_fitting(self.alpha_pattern, layer, self.alpha), self.rank_of(layer)
        return alpha / (math.sqrt(rank) if self.rs_lora else rank)


def adapted_layers(config: GPT2Config, settings: LoraSettings) -> list[str]:
    """Full names of the layers that the settings adapt, in the model's order.

    Raises:
      UserError: if a target is no layer of the model.
    """
    layers = linear_layers(config)
    for target in settings.targets:
        if not any(is_named(layer, (target,)) for layer in layers):
            raise UserError(
                f"target {target!r} is no linear layer of the model, which has "
                f"{', '.join(TARGETS)} in its blocks h_0 to h_{config.n_layer - 1}"
            )
    return [layer for layer in layers if is_named(layer, settings.targets)]


def linear_layers(config: GPT2Config) -> list[str]:
    """Full names of all layers that can be adapted: h_0.attn.c_attn, h_0.attn.c_proj, ..."""
    return [f"h_{block}.{target}" for block in range(config.n_layer) for target in TARGETS]


def lora_shapes(config: GPT2Config, settings: LoraSettings) -> Lora:
    """The adapter's tree with `jax.ShapeDtypeStruct` leaves, all float32.

    Raises:
      UserError: if a target is no layer of the model.
    """
    D, F = config.n_embd, config.mlp_width
    widths = dict(zip(TARGETS, ((D, 3 * D), (D, D), (D, F), (F, D)), strict=True))
    flat = {}
    for layer in adapted_layers(config, settings):
        rank, (width_in, width_out) = settings.rank_of(layer), widths[layer.partition(".")[2]]
        flat[f"{layer}.lora_a"] = jax.ShapeDtypeStruct((width_in, rank), jnp.float32)
        flat[f"{layer}.lora_b"] = jax.ShapeDtypeStruct((rank, width_out), jnp.float32)
    return traverse_util.unflatten_dict(flat, sep=".")


def merge(params: Params, lora: Lora, settings: LoraSettings) -> Params:
    """Adds an adapter into the parameters: W + scaling A B, formula (3) of the paper.

    Args:
      params: the base; it stays as it is, and layers without an adapter are shared with it.
      lora: float32, of `lora_shapes(config, settings)`.
      settings: those of the adapter.

    Returns:
      Parameters of the same tree, with which the plain model computes what the adapted one does.
    """
    merged = traverse_util.flatten_dict(params, sep=".")
    factors = traverse_util.flatten_dict(lora, sep=".")
    for layer in dict.fromkeys(name.rpartition(".")[0] for name in factors):
        a_IR, b_RO = factors[f"{layer}.lora_a"], factors[f"{layer}.lora_b"]
        change_IO = settings.scaling(layer) * einsum("IR,RO->IO", a_IR, b_RO, jnp.float32)
        merged[f"{layer}.kernel"] = merged[f"{layer}.kernel"] + change_IO
    return traverse_util.unflatten_dict(merged, sep=".")


def is_named(layer: str, names: Iterable[str]) -> bool:
    """Whether one of the names is the layer's, or its end from a dot on."""
    return any(layer == name or layer.endswith(f".{name}") for name in names)


def check_positive_number(name: str, value: object) -> None:
    """Raises UserError, naming the field, unless the value is a finite number above 0."""
    if not is_number(value) or not 0 < value <= sys.float_info.max:  # type: ignore[operator]
        raise UserError(f"{name}={value!r} must be a finite number above 0")


def _first_fitting(pattern: Sequence[tuple[str, _Value]], layer: str, default: _Value) -> _Value:
    return next((value for name, value in pattern if is_named(layer, (name,))), default)
