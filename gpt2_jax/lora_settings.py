"""What an adapter changes and how strongly: settings, and the layers that a name stands for.

Plain values, without jax; `gpt2_jax.lora` computes with them.
"""

import dataclasses
import math
import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

from gpt2_jax.config import GPT2Config, check_positive_int, is_number
from gpt2_jax.errors import UserError

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
    dropout: float = 0.0
    """while it trains, share of a layer's input that A does not see"""

    def __post_init__(self) -> None:
        if not self.targets:
            raise UserError(f"targets is empty; give some of {', '.join(TARGETS)}")
        for rank in (self.rank, *(rank for _, rank in self.rank_pattern)):
            check_positive_int("rank", rank)
        for alpha in (self.alpha, *(alpha for _, alpha in self.alpha_pattern)):
            check_positive_number("alpha", alpha)
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout!r} must be in [0, 1)")

    def rank_of(self, layer: str) -> int:
        """R of a layer, given its full name."""
        return _first_fitting(self.rank_pattern, layer, self.rank)

    def alpha_of(self, layer: str) -> float:
        """Alpha of a layer, given its full name."""
        return _first_fitting(self.alpha_pattern, layer, self.alpha)

    def scaling(self, layer: str) -> float:
        """The factor on A B in a layer: alpha / R, or alpha / sqrt(R)."""
        rank = self.rank_of(layer)
        return self.alpha_of(layer) / (math.sqrt(rank) if self.rs_lora else rank)


def adapted_layers(config: GPT2Config, settings: LoraSettings) -> list[str]:
    """Full names of the layers that the settings adapt, in the model's order.

    Raises:
      UserError: if a target is no layer of the model, or a pattern's name no adapted one.
    """
    layers = linear_layers(config)
    for target in settings.targets:
        if not any(is_named(layer, (target,)) for layer in layers):
            raise UserError(
                f"target {target!r} is no linear layer of the model, which has "
                f"{', '.join(TARGETS)} in its blocks h_0 to h_{config.n_layer - 1}"
            )
    adapted = [layer for layer in layers if is_named(layer, settings.targets)]
    for pattern in ("rank_pattern", "alpha_pattern"):
        for name, _ in getattr(settings, pattern):
            if not any(is_named(layer, (name,)) for layer in adapted):
                raise UserError(
                    f"{pattern} names {name!r}, which is none of the adapted layers; the targets "
                    f"are {', '.join(settings.targets)}"
                )
    return adapted


def widths(config: GPT2Config) -> dict[str, tuple[int, int]]:
    """Width of input and output, (I, O), of each of `TARGETS`."""
    D, F = config.n_embd, config.mlp_width
    return dict(zip(TARGETS, ((D, 3 * D), (D, D), (D, F), (F, D)), strict=True))


def adapter_parameter_count(config: GPT2Config, settings: LoraSettings) -> int:
    """How many parameters an adapter has: R (I + O) in each of its layers.

    Raises:
      UserError: if a target is no layer of the model.
    """
    sizes = widths(config)
    return sum(
        settings.rank_of(layer) * sum(sizes[layer.partition(".")[2]])
        for layer in adapted_layers(config, settings)
    )


def linear_layers(config: GPT2Config) -> list[str]:
    """Full names of all layers that can be adapted: h_0.attn.c_attn, h_0.attn.c_proj, ..."""
    return [f"h_{block}.{target}" for block in range(config.n_layer) for target in TARGETS]


def is_named(layer: str, names: Iterable[str]) -> bool:
    """Whether one of the names is the layer's, or its end from a dot on."""
    return any(layer == name or layer.endswith(f".{name}") for name in names)


def check_positive_number(name: str, value: object) -> None:
    """Raises UserError, naming the field, unless the value is a finite number above 0."""
    if not is_number(value) or not 0 < value <= sys.float_info.max:  # type: ignore[operator]
        raise UserError(f"{name}={value!r} must be a finite number above 0")


def _first_fitting(pattern: Sequence[tuple[str, _Value]], layer: str, default: _Value) -> _Value:
    return next((value for name, value in pattern if is_named(layer, (name,))), default)
