"""What the fields of PEFT's adapter_config.json mean for a GPT-2 (`LoraConfig` of PEFT 0.21)."""

import re
from collections.abc import Mapping
from typing import Any

from gpt2_jax.config import GPT2Config, check_positive_int, is_number
from gpt2_jax.errors import UserError
from gpt2_jax.interop.peft_names import (
    ending,
    matches,
    module_name,
    pattern_of,
    pattern_value,
    shortened,
)
from gpt2_jax.lora_settings import (
    TARGETS,
    LoraSettings,
    check_positive_number,
    linear_layers,
)

# Fields with only some values supported: the rest train other weights or compute otherwise.
_FIXED_FIELDS: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "layers_pattern": (None, "h", ["h"], "", []),
}
# Starting points that leave the base as it is; others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA)
# take from it what they put into the adapter, which then fits only the base so changed.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# What is read here, with PEFT's defaults (of target_modules: for GPT-2).
_READ_FIELDS: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 8,
    "use_rslora": False,
    "lora_dropout": 0.0,
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_modules": ["c_attn"],
    "exclude_modules": None,
    "layers_to_transform": None,
    "init_lora_weights": True,
}
# Fields that change no result of an adapter once trained: how it was, or where it came from.
# fan_in_fan_out tells how the base stores its weights, and PEFT corrects it for GPT-2's; the
# adapter's own matrices are the same with either.
_INERT_FIELDS = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
)
_KNOWN_FIELDS = {*_FIXED_FIELDS, *_READ_FIELDS, *_INERT_FIELDS}

# What PEFT can adapt in a GPT-2 besides the linear layers of its blocks.
_OTHER_MODULES = ("transformer.wte", "transformer.wpe", "lm_head")


def checked_fields(fields: Any, source: str) -> dict[str, Any]:
    """Checks all that can be checked without the base model.

    Args:
      fields: the parsed JSON.
      source: where it came from, for error messages.

    Returns:
      The fields, those left out with PEFT's defaults.

    Raises:
      UserError: if a value is of the wrong type or out of range, or asks for what is not
        supported; any field unknown here does that, unless it is off.
    """
    if not isinstance(fields, dict) or "peft_type" not in fields:
        raise UserError(f"{source} is not a PEFT config: it has no peft_type")
    for name, supported in _FIXED_FIELDS.items():
        if fields.get(name, supported[0]) not in supported:
            rule = f"it may be {' or '.join(repr(value) for value in supported)}"
            raise _not_supported(source, name, fields[name], rule)
    for name, value in fields.items():
        if name not in _KNOWN_FIELDS and value:
            raise _not_supported(source, name, value, "only plain LoRA can be loaded")
    fields = {**_READ_FIELDS, **fields}
    if fields["init_lora_weights"] not in _INITS:
        raise _not_supported(
            source,
            "init_lora_weights",
            fields["init_lora_weights"],
            "it can change the base: save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion",
        )
    try:
        _check_types(fields)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    return fields


def settings_from_json(fields: Mapping[str, Any], config: GPT2Config, source: str) -> LoraSettings:
    """Reads the contents of an adapter_config.json, matching names as PEFT does.

    Args:
      fields: of `checked_fields`.
      config: the base model.
      source: where it came from, for error messages.

    Raises:
      UserError: if a target is no linear layer of the model, or none is left to adapt.
    """
    layers = _targeted(fields, config, source)
    rank, alpha = fields["r"], fields["lora_alpha"]
    ranks = {layer: pattern_value(fields["rank_pattern"], layer, rank) for layer in layers}
    alphas = {layer: pattern_value(fields["alpha_pattern"], layer, alpha) for layer in layers}
    return LoraSettings(
        targets=tuple(shortened(dict.fromkeys(layers, True), config.n_layer)),
        rank=rank,
        alpha=alpha,
        rs_lora=fields["use_rslora"],
        rank_pattern=pattern_of(ranks, rank, config.n_layer),
        alpha_pattern=pattern_of(alphas, alpha, config.n_layer),
        dropout=fields["lora_dropout"],
    )


def _targeted(fields: Mapping[str, Any], config: GPT2Config, source: str) -> list[str]:
    """Full names of the layers that PEFT would adapt, in the model's order."""
    targets = fields["target_modules"]
    if targets is None:
        targets = _READ_FIELDS["target_modules"]
    elif isinstance(targets, str) and targets.lower() == "all-linear":
        targets = list(TARGETS)
    _check_targets(targets, config, source)
    chosen = _chosen_blocks(fields, config, source)
    exclude = fields["exclude_modules"]
    found = [
        layer
        for layer in linear_layers(config)
        if matches(targets, module_name(layer))
        # PEFT lets the choice of blocks bear on shortened names alone.
        and (chosen is None or _block(layer) in chosen or module_name(layer) in targets)
        and not (exclude and matches(exclude, module_name(layer)))
    ]
    if not found:
        raise UserError(
            f"{source} adapts no layer; see its target_modules, exclude_modules and "
            f"layers_to_transform"
        )
    return found


def _check_targets(targets: str | list[str], config: GPT2Config, source: str) -> None:
    """Every name must be that of a linear layer at least, and of nothing else PEFT can adapt."""
    for target in [targets] if isinstance(targets, str) else targets:
        names = targets if isinstance(targets, str) else [target]
        for module in _OTHER_MODULES:
            if matches(names, module):
                rule = f"it adapts {module}, but only linear layers of the blocks can be adapted"
                raise _not_supported(source, "target_modules", target, rule)
        if not any(matches(names, module_name(layer)) for layer in linear_layers(config)):
            raise UserError(
                f"{source}: target_modules has {target!r}, which is no linear layer of the model; "
                f"it has {', '.join(TARGETS)} in its blocks h.0 to h.{config.n_layer - 1}"
            )


def _chosen_blocks(fields: Mapping[str, Any], config: GPT2Config, source: str) -> set[int] | None:
    """The blocks of `layers_to_transform`; None means all."""
    blocks = fields["layers_to_transform"]
    if blocks is None or blocks == []:
        return None
    chosen = {blocks} if isinstance(blocks, int) else set(blocks)
    for block in chosen:
        if not 0 <= block < config.n_layer:
            raise UserError(
                f"{source}: layers_to_transform has {block}, but the model has layers 0 to "
                f"{config.n_layer - 1}; give the source the adapter was trained on"
            )
    return chosen


def _block(layer: str) -> int:
    return int(layer.partition(".")[0].removeprefix("h_"))


def _check_types(fields: Mapping[str, Any]) -> None:
    check_positive_int("r", fields["r"])
    check_positive_number("lora_alpha", fields["lora_alpha"])
    dropout = fields["lora_dropout"]
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise UserError(f"lora_dropout={dropout!r} must be a number from 0 to less than 1")
    if not isinstance(fields["use_rslora"], bool):
        raise UserError(f"use_rslora={fields['use_rslora']!r} must be true or false")
    for name in ("target_modules", "exclude_modules"):
        value = fields[name]
        if isinstance(value, str):
            _check_regex(name, value)
        elif value is not None and not _is_list_of(str, value):
            raise UserError(f"{name}={value!r} must be a string or a list of strings")
    blocks = fields["layers_to_transform"]
    if not (blocks is None or type(blocks) is int or _is_list_of(int, blocks)):
        raise UserError(f"layers_to_transform={blocks!r} must be a number or a list of numbers")
    if blocks is not None and isinstance(fields["target_modules"], str):
        raise UserError("layers_to_transform needs target_modules to be a list, not an expression")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(fields[name] or {}, dict):
            raise UserError(f"{name}={fields[name]!r} must map names to numbers")
        for key, value in (fields[name] or {}).items():
            _check_regex(name, ending(key))
            check = check_positive_int if name == "rank_pattern" else check_positive_number
            check(f"{name} {key!r}", value)


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _check_regex(name: str, expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise UserError(f"{name} has {expression!r}, no regular expression: {error}") from None


def _not_supported(source: str, name: str, value: Any, remedy: str) -> UserError:
    return UserError(f"{source} has {name}={value!r}, which is not supported; {remedy}")
