"""Reads weight files from outside into numpy arrays; nothing in them is ever executed."""

import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  teaches numpy the name "bfloat16", which safetensors asks it for
import numpy as np
from safetensors import SafetensorError, safe_open

from gpt2_jax.errors import UserError

StateDict = dict[str, np.ndarray]

SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
TORCH_SUFFIXES = (".pt", ".pth", ".bin")
# Where training scripts put the state dict among other things they save.
_WRAPPERS = ("state_dict", "model_state_dict", "model")


def read_directory(directory: Path) -> StateDict:
    """Reads the weights of a Hugging Face model directory: safetensors, whole or in shards.

    A `pytorch_model.bin` is read where there are no safetensors.

    Raises:
      UserError: if there are no weights, or a file is missing or damaged.
    """
    if (directory / SAFETENSORS).is_file():
        return read_safetensors(directory / SAFETENSORS)
    index = directory / SAFETENSORS_INDEX
    if index.is_file():
        state: StateDict = {}
        for name in shard_names(index):
            state.update(read_safetensors(directory / name))
        return state
    if (directory / "pytorch_model.bin").is_file():
        return read_torch(directory / "pytorch_model.bin")
    raise UserError(
        f"{directory} holds no weights: neither {SAFETENSORS} nor {SAFETENSORS_INDEX} nor "
        f"pytorch_model.bin; give a complete Hugging Face model directory"
    )


def read_file(file: Path) -> StateDict:
    """Reads one weight file, by its suffix.

    Raises:
      UserError: if the suffix is unknown, or the file is missing or damaged.
    """
    if file.suffix == ".safetensors":
        return read_safetensors(file)
    if file.suffix in TORCH_SUFFIXES:
        return read_torch(file)
    raise UserError(
        f"{file} is no weight file; its name must end in .safetensors or "
        f"{', '.join(TORCH_SUFFIXES)}"
    )


def read_safetensors(file: Path) -> StateDict:
    """Reads a safetensors file.

    Raises:
      UserError: if it is missing or damaged.
    """
    try:
        with safe_open(file, framework="numpy") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except OSError as error:
        raise UserError(f"cannot read weights {file}: {error}; give another file") from None
    except (SafetensorError, TypeError, ValueError) as error:
        raise UserError(
            f"weights {file} are damaged or not safetensors ({error}); download them again"
        ) from None


def shard_names(index: Path) -> list[str]:
    """The shard files a safetensors index names, sorted.

    Raises:
      UserError: if the index is damaged, or names a file outside its own directory.
    """
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"index {index} is damaged ({error!r}); download it again") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"index {index} names {name!r}, which is no file beside it; refused")
    return names


def read_torch(file: Path) -> StateDict:
    """Reads a state dict that `torch.save` wrote, refusing pickled code.

    Raises:
      UserError: if PyTorch is not installed, or the file is missing, damaged, or holds
        anything but tensors.
    """
    try:
        import torch
    except ModuleNotFoundError:
        raise UserError(
            f"reading {file} needs PyTorch; pip install torch, or give safetensors"
        ) from None
    try:
        with warnings.catch_warnings():
            # torch warns of unusual pickles; what it cannot read it refuses all the same.
            warnings.simplefilter("ignore")
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"weights {file} do not exist; give another file") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"weights {file} are damaged or hold Python objects besides tensors, which could "
            f"run code, so they are refused; save the plain state dict, best as safetensors"
        ) from None
    except Exception as error:
        # torch.load raises whatever its zip and pickle readers do: RuntimeError, EOFError, ...
        reason = repr(error).split("\\n")[0]
        raise UserError(f"weights {file} are damaged ({reason}); get them anew") from None
    state = _unwrap(loaded)
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"{file} is no state dict: {name!r} is a {type(tensor).__name__}")
    return {
        str(name): (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        for name, tensor in state.items()
    }


def _unwrap(loaded: Any) -> Mapping[str, Any]:
    for wrapper in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            return loaded[wrapper]
    return loaded if isinstance(loaded, Mapping) else {"the whole": loaded}
