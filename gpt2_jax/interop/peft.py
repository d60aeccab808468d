"""Adapters in the format of Hugging Face's PEFT: adapter_config.json, adapter_model.safetensors.

PEFT keeps a linear layer's two matrices as PyTorch keeps weights, (out, in):

    base_model.model.transformer.h.0.attn.c_attn.lora_A.weight [R, I]  =  h_0/attn/c_attn/lora_a.T
    base_model.model.transformer.h.0.attn.c_attn.lora_B.weight [O, R]  =  h_0/attn/c_attn/lora_b.T

`peft_config` tells what the config's fields mean, `peft_names` what names stand for.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import save_file

from gpt2_jax.config import GPT2Config
from gpt2_jax.errors import UserError
from gpt2_jax.files import directory_written_beside, read_text, write_text
from gpt2_jax.interop import weight_files
from gpt2_jax.interop.peft_config import checked_fields, settings_from_json
from gpt2_jax.interop.peft_names import CONFIG, PICKLE, SAFETENSORS, tensor_name
from gpt2_jax.interop.peft_write import check_output, settings_to_json
from gpt2_jax.lora import Lora, lora_shapes
from gpt2_jax.lora_settings import LoraSettings


@dataclasses.dataclass(frozen=True)
class AdapterFiles:
    """An adapter as it lies on disk, not yet held against a base model."""

    directory: Path
    fields: dict[str, Any]
    """adapter_config.json, checked, with PEFT's defaults"""
    state: weight_files.StateDict
    """tensors by PEFT's names"""


def load_adapter(directory: Path, config: GPT2Config) -> tuple[Lora, LoraSettings]:
    """Loads an adapter for a model: `merge(params, *load_adapter(directory, config))`.

    Args:
      directory: what PEFT's `save_pretrained` wrote.
      config: the base model.

    Returns:
      The adapter, float32, and its settings.

    Raises:
      UserError: if the files are missing or damaged, ask for more than plain LoRA, or do not
        fit the model.
    """
    return fit_adapter(read_adapter(directory), config)


def save_adapter(
    directory: Path,
    lora: Lora,
    settings: LoraSettings,
    config: GPT2Config,
    *,
    base: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> None:
    """Makes a directory that PEFT's `PeftModel.from_pretrained` opens, and `load_adapter`.

    It appears whole, or what was there stays. `load_adapter` gives the same arrays back bit for
    bit, and equal settings if they are named as it names them: "attn.c_attn" for a layer of each
    block, "h_0.attn.c_attn" for that of one. Otherwise it gives settings that mean the same.

    Args:
      directory: may exist if it is empty, or holds an adapter alone and `overwrite` is set.
      lora: float32, of `lora_shapes(config, settings)`.
      settings: those of the adapter.
      config: the base model.
      base: where PEFT is to look for it, a hub's name or a directory; None leaves it open.
      revision: of the base on the hub.
      overwrite: whether an adapter that is there is replaced.

    Raises:
      UserError: naming a tensor that does not fit the settings and the model or is not finite;
        or if the directory holds anything else, or cannot be written.
    """
    state = _state_of(lora, settings, config)
    fields = settings_to_json(settings, config, base, revision)
    check_output(directory, overwrite)
    try:
        with directory_written_beside(directory.resolve()) as scratch:
            save_file(state, scratch / SAFETENSORS, metadata={"format": "pt"})
            write_text(scratch / CONFIG, json.dumps(fields, indent=2) + "\n")
    except (OSError, SafetensorError) as error:  # safetensors tells of a full disk in its own way
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot write adapter {directory}: {reason}; make room or give another directory"
        ) from None


def read_adapter(directory: Path) -> AdapterFiles:
    """Reads an adapter's files and checks what can be checked without its base.

    Raises:
      UserError: if a file is missing or damaged, or asks for more than plain LoRA.
    """
    if not directory.is_dir():
        raise UserError(f"adapter {directory} is no directory; give one that PEFT wrote")
    config_file, weights = directory / CONFIG, directory / SAFETENSORS
    if not config_file.exists():
        raise UserError(
            f"{directory} has no {CONFIG}; give a directory that PEFT's save_pretrained wrote"
        )
    try:
        fields = json.loads(read_text(config_file))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{config_file} is not JSON ({error}); save the adapter again") from None
    fields = checked_fields(fields, str(config_file))
    if not weights.exists() and (directory / PICKLE).exists():
        raise UserError(
            f"{directory / PICKLE} is a pickle, which could run code, so it is refused; load the "
            f"adapter with PEFT and save_pretrained it again, which writes {SAFETENSORS}"
        )
    if not weights.exists():
        raise UserError(f"{directory} has no {SAFETENSORS}; save the adapter again")
    return AdapterFiles(directory, fields, weight_files.read_safetensors(weights))


def fit_adapter(files: AdapterFiles, config: GPT2Config) -> tuple[Lora, LoraSettings]:
    """Turns an adapter's files into its tree and settings for a model.

    Raises:
      UserError: if a target is no layer of the model; or naming a tensor that is missing, extra,
        of the wrong shape or dtype, or not finite.
    """
    settings = settings_from_json(files.fields, config, str(files.directory / CONFIG))
    shapes = traverse_util.flatten_dict(lora_shapes(config, settings), sep=".")
    expected = {tensor_name(path): leaf.shape[::-1] for path, leaf in shapes.items()}
    problems = _misfits(files.state, expected)
    if problems:
        raise UserError(
            f"adapter {_described(files)} does not fit the model (n_layer={config.n_layer}, "
            f"n_embd={config.n_embd}): {'; '.join(problems)}; give the source it was trained on, "
            f"and a complete adapter"
        )
    source = f"adapter {files.directory}"
    names = {path: tensor_name(path) for path in shapes}
    lora = {
        path: jnp.asarray(_finite(source, name, files.state[name]).T)
        for path, name in names.items()
    }
    return traverse_util.unflatten_dict(lora, sep="."), settings


def _misfits(state: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is wrong, each kind with its first example and the number of others."""
    shapes, dtypes = [], []
    for name in (name for name in expected if name in state):
        if state[name].shape != expected[name]:
            shapes.append(f"{name} has shape {state[name].shape}, not {expected[name]}")
        elif not jnp.issubdtype(state[name].dtype, jnp.floating):
            dtypes.append(f"{name} has dtype {state[name].dtype}, not a float")
    missing = [f"missing {name}" for name in expected if name not in state]
    extra = [f"extra {name}" for name in state if name not in expected]
    return [
        kind[0] + (f" (and {len(kind) - 1} more)" if len(kind) > 1 else "")
        for kind in (shapes, dtypes, missing, extra)
        if kind
    ]


def _finite(source: str, name: str, array: np.ndarray) -> np.ndarray:
    """A tensor in float32, checked."""
    with np.errstate(over="ignore"):  # a float64 too large becomes infinity, and that is told
        array = np.asarray(array, np.float32)
    if not np.isfinite(array).all():
        raise UserError(
            f"{source} is unusable: {name} holds NaN or infinity; "
            f"give one from before its training broke down"
        )
    return array


def _state_of(lora: Lora, settings: LoraSettings, config: GPT2Config) -> weight_files.StateDict:
    """The adapter's tensors by PEFT's names, float32, checked."""
    shapes = traverse_util.flatten_dict(lora_shapes(config, settings), sep=".")
    flat = traverse_util.flatten_dict(lora, sep=".")
    problems = _misfits(flat, {path: leaf.shape for path, leaf in shapes.items()})
    if problems:
        raise UserError(
            f"the adapter does not fit its settings (rank={settings.rank}, "
            f"targets={settings.targets}) and the model (n_layer={config.n_layer}, "
            f"n_embd={config.n_embd}): {'; '.join(problems)}; give those it was trained with"
        )
    # safetensors writes an array's memory as it lies there, strides or not.
    return {
        tensor_name(path): np.ascontiguousarray(_finite("the adapter", path, flat[path]).T)
        for path in shapes
    }


def _described(files: AdapterFiles) -> str:
    """The adapter's own size, told from its files, to be held against the model's."""
    blocks = {int(block) for name in files.state for block in re.findall(r"\.h\.(\d+)\.", name)}
    base = files.fields.get("base_model_name_or_path")
    parts = [f"r={files.fields['r']}"]
    parts += [f"blocks up to h.{max(blocks)}"] if blocks else []
    parts += [f"trained on {base!r}"] if base else []
    return f"{files.directory} ({', '.join(parts)})"
