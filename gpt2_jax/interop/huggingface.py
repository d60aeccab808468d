"""Hugging Face's names for a GPT-2: its `config.json` and its state dict.

Both parameter sets hold the same arrays in the same layout, so conversion is renaming:

    transformer.h.0.attn.c_attn.weight  <->  h_0/attn/c_attn/kernel
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from gpt2_jax.config import GPT2Config
from gpt2_jax.errors import UserError
from gpt2_jax.model import Params, param_shapes

PREFIX = "transformer."

# config.json fields that mean here what they mean there.
_SHARED_FIELDS = (
    "vocab_size",
    "n_positions",
    "n_embd",
    "n_layer",
    "n_head",
    "n_inner",
    "activation_function",
    "layer_norm_epsilon",
    "initializer_range",
    "embd_pdrop",
    "attn_pdrop",
    "resid_pdrop",
    "tie_word_embeddings",
    "eos_token_id",
)
# Fields that change the function a model computes, with the only value supported.
# reorder_and_upcast_attn is not among them: softmax is in float32 here in any case.
_FIXED_FIELDS: dict[str, Any] = {
    "model_type": "gpt2",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "quantization_config": None,
}
# Causal masks that older checkpoints store beside the weights.
_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")


def config_from_json(fields: Mapping[str, Any], source: str) -> GPT2Config:
    """Reads the contents of a Hugging Face `config.json`.

    Fields left out have Hugging Face's defaults, which are `GPT2Config`'s own.

    Args:
      fields: the parsed JSON.
      source: where it came from, for error messages.

    Raises:
      UserError: if a value is out of range, or asks for a feature GPT-2 here doesn't have.
    """
    if not isinstance(fields, Mapping) or "model_type" not in fields:
        raise UserError(f"{source} is not a Hugging Face model config: it has no model_type")
    for name, supported in _FIXED_FIELDS.items():
        value = fields.get(name, supported)
        if value != supported and not (name == "pruned_heads" and value is None):
            raise UserError(
                f"{source} has {name}={value!r}, which is not supported; "
                f"only models with {name}={supported!r} can be loaded"
            )
    try:
        return GPT2Config(**{name: fields[name] for name in _SHARED_FIELDS if name in fields})
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def config_to_json(config: GPT2Config) -> dict[str, Any]:
    """The contents of a Hugging Face `config.json` for this model, without vocabulary padding.

    GPT-2 begins a text with the token that ends one. `n_ctx` is an old name of `n_positions`, the
    only one that llama.cpp's converter knows.
    """
    shared = {name: getattr(config, name) for name in _SHARED_FIELDS}
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **shared,
        "n_ctx": config.n_positions,
        "bos_token_id": config.eos_token_id,
    }


def params_from_state_dict(
    state: Mapping[str, np.ndarray], config: GPT2Config, source: str
) -> Params:
    """Turns a state dict into a parameter tree, float32, vocabulary padded with zeros.

    Keys may lack the "transformer." prefix; stored causal masks are ignored; a tied head may
    be stored or not.

    Args:
      state: arrays by Hugging Face name.
      config: the model they must fit.
      source: where they came from, for error messages.

    Raises:
      UserError: naming every weight that is missing, extra or of the wrong shape or dtype.
    """
    given = {
        name: array
        for name, array in strip_prefix(state, source).items()
        if not _BUFFER.fullmatch(name)
    }
    if config.tie_word_embeddings and "lm_head.weight" in given:
        _check_tied(given, source)
        del given["lm_head.weight"]

    expected = expected_shapes(config)
    problems = [f"missing {name}" for name in expected if name not in given]
    problems += [f"extra {name}" for name in given if name not in expected]
    for name, shape in expected.items():
        if name in given:
            problems += _mismatch(name, given[name], shape)
    if problems:
        shown = "; ".join(problems[:8])
        rest = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(
            f"{source} does not fit the model: {shown}{rest}; give the config that belongs to it"
        )

    padding = ((0, config.padded_vocab_size - config.vocab_size), (0, 0))
    flat = {}
    for name in expected:
        array = np.asarray(given[name], np.float32)
        flat[param_path(name)] = jnp.asarray(
            np.pad(array, padding) if name in ("wte.weight", "lm_head.weight") else array
        )
    return traverse_util.unflatten_dict(flat, sep="/")


def state_dict_from_params(params: Params, config: GPT2Config) -> dict[str, np.ndarray]:
    """The parameters under Hugging Face's names, as `GPT2LMHeadModel.state_dict()` has them.

    The vocabulary's padding is removed, and a tied head stands beside the embedding.
    """
    shapes = expected_shapes(config)
    flat = traverse_util.flatten_dict(params, sep="/")
    state = {}
    for name, shape in shapes.items():
        array = np.asarray(flat[param_path(name)])[: shape[0]]
        state[name if name == "lm_head.weight" else PREFIX + name] = array
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state[f"{PREFIX}wte.weight"]
    return state


def stored_state_dict(params: Params, config: GPT2Config) -> dict[str, np.ndarray]:
    """The same as a file stores it: without a tied head, which is the embedding."""
    state = state_dict_from_params(params, config)
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def expected_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Every weight's Hugging Face name without prefix, and its shape without padding."""
    return dict(_expected_shapes(config))


@functools.cache  # tracing the model takes a tenth of a second
def _expected_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    flat = traverse_util.flatten_dict(param_shapes(config), sep="/")
    shapes = {state_name(path): leaf.shape for path, leaf in flat.items()}
    for name in ("wte.weight", "lm_head.weight"):
        if name in shapes:
            shapes[name] = (config.vocab_size, config.n_embd)
    return shapes


def state_name(path: str) -> str:
    """h_0/attn/c_attn/kernel -> h.0.attn.c_attn.weight."""
    *modules, leaf = path.split("/")
    if leaf in ("kernel", "scale", "embedding"):
        leaf = "weight"
    return re.sub(r"^h_", "h.", ".".join([*modules, leaf]))


def param_path(name: str) -> str:
    """h.0.attn.c_attn.weight -> h_0/attn/c_attn/kernel."""
    *modules, leaf = re.sub(r"^h\.", "h_", name).split(".")
    if leaf == "weight":
        if modules[-1].startswith("ln_"):
            leaf = "scale"
        else:
            leaf = "kernel" if modules[-1].startswith("c_") else "embedding"
    return "/".join([*modules, leaf])


def strip_prefix(state: Mapping[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
    """The state dict with "transformer." taken off its keys.

    Raises:
      UserError: if a weight is there twice, with and without.
    """
    stripped = {}
    for name, array in state.items():
        short = name.removeprefix(PREFIX)
        if short in stripped:
            raise UserError(f"{source} holds {short} twice, with and without {PREFIX!r}; drop one")
        stripped[short] = array
    return stripped


def _check_tied(given: Mapping[str, np.ndarray], source: str) -> None:
    head, table = given["lm_head.weight"], given.get("wte.weight")
    if table is not None and not np.array_equal(head, table):
        raise UserError(
            f"{source}: lm_head.weight differs from wte.weight, but the config ties them; "
            f"set tie_word_embeddings to false"
        )


def _mismatch(name: str, array: np.ndarray, shape: tuple[int, ...]) -> list[str]:
    if tuple(array.shape) != tuple(shape):
        return [f"{name} has shape {tuple(array.shape)}, not {tuple(shape)}"]
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return [f"{name} has dtype {array.dtype}, not a float"]
    return []
