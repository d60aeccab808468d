"""What an adapter's config is written as, and whether a directory may be replaced by one."""

import json
import re
from pathlib import Path
from typing import Any

from gpt2_jax.config import GPT2Config
from gpt2_jax.errors import UserError
from gpt2_jax.interop.peft_names import (
    CONFIG,
    SAFETENSORS,
    pattern_of,
    short_module_name,
    shortened,
)
from gpt2_jax.lora_settings import LoraSettings, adapted_layers


def settings_to_json(
    settings: LoraSettings,
    config: GPT2Config,
    base: str | None = None,
    revision: str | None = None,
) -> dict[str, Any]:
    """What an adapter_config.json has, such that PEFT and `peft_config` read the same.

    Args:
      settings: of the adapter.
      config: the base model.
      base: where PEFT finds it, a hub's name or a directory.
      revision: of the base on the hub.

    Raises:
      UserError: if a target is no layer of the model, or a pattern's name no adapted one.
    """
    layers = adapted_layers(config, settings)
    ranks = {layer: settings.rank_of(layer) for layer in layers}
    alphas = {layer: settings.alpha_of(layer) for layer in layers}
    targets = shortened(dict.fromkeys(layers, True), config.n_layer)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": _plain_number(settings.alpha),
        "use_rslora": settings.rs_lora,
        "lora_dropout": settings.dropout,
        "target_modules": [short_module_name(name) for name in targets],
        "rank_pattern": {
            re.escape(short_module_name(name)): rank
            for name, rank in pattern_of(ranks, settings.rank, config.n_layer)
        },
        "alpha_pattern": {
            re.escape(short_module_name(name)): _plain_number(alpha)
            for name, alpha in pattern_of(alphas, settings.alpha, config.n_layer)
        },
        "bias": "none",
        "fan_in_fan_out": True,
    }


def check_output(directory: Path, overwrite: bool) -> None:
    """Checks that an adapter may be written to a directory, which need not exist.

    Raises:
      UserError: if it holds anything but an adapter that may be replaced.
    """
    try:
        entries = sorted(directory.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:  # a file, links in a loop, a folder that is closed
        raise UserError(
            f"cannot write adapter {directory}: {error.strerror}; give another directory"
        ) from None
    known = (CONFIG, SAFETENSORS)
    foreign = [path.name for path in entries if path.name not in known or not path.is_file()]
    if entries and not foreign and not _is_peft_config(directory / CONFIG):
        foreign = [entries[0].name]
    if foreign:
        raise UserError(
            f"{directory} is no adapter, or not that alone: it holds {foreign[0]}; "
            f"move it away or give another directory"
        )
    if entries and not overwrite:
        raise UserError(
            f"{directory} already holds an adapter; give another directory, or ask to overwrite it"
        )


def _is_peft_config(file: Path) -> bool:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and "peft_type" in fields


def _plain_number(value: float) -> int | float:
    """A whole number as PEFT writes it, without a point."""
    return int(value) if value == int(value) else value
