"""Writes a model as Hugging Face's `save_pretrained` would, for every tool that reads that."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from gpt2_jax.config import GPT2Config
from gpt2_jax.errors import UserError
from gpt2_jax.files import directory_written_beside, write_text
from gpt2_jax.interop import model_directory, weight_files
from gpt2_jax.interop.huggingface import config_to_json, stored_state_dict
from gpt2_jax.model import Params

Dtype = Literal["float32", "bfloat16"]

_PIPELINE_TOKENS = 256

_NOTHING: Mapping[str, Any] = MappingProxyType({})


def export_model(
    directory: Path,
    params: Params,
    config: GPT2Config,
    *,
    dtype: Dtype = "float32",
    files: Mapping[str, bytes] = _NOTHING,
    fields: Mapping[str, Any] = _NOTHING,
    overwrite: bool = False,
) -> None:
    """Makes a directory that `transformers.AutoModelForCausalLM.from_pretrained` opens.

    It appears whole, or what was there stays.

    Args:
      directory: may exist if it is empty, or holds a model and `overwrite` is set.
      params: float32; rows that pad the vocabulary are left out.
      config: of the model.
      dtype: of the weights in the file; bfloat16 rounds to the nearest, ties to even.
      files: more files' contents by name, such as a tokenizer's. A generation_config.json among
        them is written as it is.
      fields: of config.json, where it is not to have those of `config`.
      overwrite: whether a model that is there is replaced.

    Raises:
      UserError: if the directory holds anything else, or cannot be written.
    """
    model_directory.check_output(directory, overwrite)
    try:
        with directory_written_beside(directory.resolve()) as scratch:
            write_model_files(scratch, params, config, dtype=dtype, fields=fields)
            for name, contents in files.items():
                (scratch / name).write_bytes(contents)
    except (OSError, SafetensorError) as error:  # safetensors tells of a full disk in its own way
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot write {directory}: {reason}; make room or give another --output"
        ) from None


def write_model_files(
    directory: Path,
    params: Params,
    config: GPT2Config,
    *,
    dtype: Dtype = "float32",
    fields: Mapping[str, Any] = _NOTHING,
) -> None:
    """Writes config.json, generation_config.json and model.safetensors into a directory.

    A tied head is the embedding and is not stored a second time. `fields` of config.json are set
    to these values.

    Raises:
      OSError: if a file cannot be written.
      SafetensorError: if the weights cannot.
    """
    numpy_dtype = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype]
    state = stored_state_dict(params, config)
    # safetensors writes an array's memory as it lies there, strides or not.
    state = {name: np.ascontiguousarray(array, numpy_dtype) for name, array in state.items()}
    save_file(state, directory / weight_files.SAFETENSORS, metadata={"format": "pt"})
    described = {**config_to_json(config), **fields, "dtype": dtype, "torch_dtype": dtype}
    _write_json(directory / model_directory.CONFIG, described)
    _write_json(directory / model_directory.GENERATION_CONFIG, _generation_fields(described))


def _generation_fields(described: Mapping[str, Any]) -> dict[str, Any]:
    """What `generate` does unasked with the model that config.json describes.

    What ends a text pads it too, if nothing else does. A pipeline asks for 256 new tokens and
    crashes where fewer fit, unless there is a `max_length`. Where there is room for them it is
    left out: then a call that gives its own number of new tokens is warned of two limits.
    """
    fields = {name: described[name] for name in ("bos_token_id", "eos_token_id")}
    pad = described.get("pad_token_id")
    fields["pad_token_id"] = fields["eos_token_id"] if pad is None else pad
    if described["n_positions"] <= 2 * _PIPELINE_TOKENS:
        fields["max_length"] = described["n_positions"]
    return fields


def _write_json(file: Path, fields: Mapping[str, Any]) -> None:
    write_text(file, json.dumps(fields, indent=2) + "\n")
