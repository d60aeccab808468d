"""PEFT's names for an adapter's files and tensors, and how its configs name a GPT-2's layers."""

import re
from collections.abc import Mapping
from typing import TypeVar

from gpt2_jax.lora_settings import is_named

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."

_MATRICES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}

_Value = TypeVar("_Value")


def module_name(layer: str) -> str:
    """h_0.attn.c_attn -> transformer.h.0.attn.c_attn, as PEFT sees it."""
    return "transformer." + re.sub(r"^h_", "h.", layer)


def tensor_name(path: str) -> str:
    """h_0.attn.c_attn.lora_a -> base_model.model.transformer.h.0.attn.c_attn.lora_A.weight."""
    layer, _, matrix = path.rpartition(".")
    return f"{PREFIX}{module_name(layer)}.{_MATRICES[matrix]}"


def shortened(values: Mapping[str, _Value], n_layer: int) -> dict[str, _Value]:
    """Values by names as short as can be, of which none fits a layer that another fits.

    Args:
      values: by layers' full names.
      n_layer: number of blocks.

    Returns:
      "attn.c_attn" once where that layer has the same value in each block, else full names.
    """
    named = {}
    for layer, value in values.items():
        target = layer.partition(".")[2]
        blocks = [values.get(f"h_{block}.{target}") for block in range(n_layer)]
        named[target if all(other == value for other in blocks) else layer] = value
    return named


def pattern_of(
    values: Mapping[str, _Value], default: _Value, n_layer: int
) -> tuple[tuple[str, _Value], ...]:
    """A pattern of `LoraSettings` for the values that are not the default, `shortened`."""
    others = {layer: value for layer, value in values.items() if value != default}
    return tuple(shortened(others, n_layer).items())


def short_module_name(name: str) -> str:
    """A name of `shortened` as PEFT has it: that of a single block's layer becomes the module's."""
    return module_name(name) if name.startswith("h_") else name


def matches(names: str | list[str], module: str) -> bool:
    """PEFT's rule: a string is a regular expression, a list has names or ends of names."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return is_named(module, names)


def pattern_value(pattern: Mapping[str, _Value] | None, layer: str, default: _Value) -> _Value:
    """PEFT's rule: the first key that fits, a regular expression of the name or its end."""
    for key, value in (pattern or {}).items():
        if re.match(ending(key), module_name(layer)):
            return value
    return default


def ending(key: str) -> str:
    """The expression for names that end in what a pattern's key stands for."""
    return rf"(.*\.)?({key})$"
