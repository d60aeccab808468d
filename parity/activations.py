"""Everything a GPT-2 computes on its way to the logits, place by place, in all three models.

A place is "embedding", "h_3.ln_1" (block 3, one of `SITES`), "ln_f" or "logits"; places stand in
the order of computation, so the first that differs is where two models part.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from jax.typing import DTypeLike

from gpt2_jax.config import GPT2Config
from gpt2_jax.model import GPT2, Params
from parity.models import Models
from parity.outcomes import Check
from parity.rounding import relative_errors, to_numpy

Activations = dict[str, np.ndarray]

# What each is of a block, and where the JAX model and the PyTorch models have it: the output of a
# module, its input ("<"), or for q, k and v a third of the output.
SITES = {
    "ln_1": ("ln_1/__call__", "ln_1"),
    "q": ("attn/q", "attn.c_attn"),
    "k": ("attn/k", "attn.c_attn"),
    "v": ("attn/v", "attn.c_attn"),
    "probabilities": ("attn/probabilities", "attn"),
    "mixed": ("attn/mixed", "<attn.c_proj"),
    "attention": ("attn/c_proj/__call__", "attn.c_proj"),
    "middle": ("middle", "<ln_2"),
    "ln_2": ("ln_2/__call__", "ln_2"),
    "c_fc": ("mlp/c_fc/__call__", "mlp.c_fc"),
    "activation": ("mlp/activation", "<mlp.c_proj"),
    "mlp": ("mlp/c_proj/__call__", "mlp.c_proj"),
    "residual": ("__call__/0", ""),
}
"""The places in a block, in the order of computation: the layer norm's output; queries, keys and
values by head; attention probabilities; the values they mix; the attention branch; the stream
after it; the second norm; the MLP before and after its nonlinearity; its branch; the stream."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far two models are apart at one place."""

    place: str
    shape: tuple[int, ...]
    relative: float
    """norm of the difference over the norm of theirs"""
    largest: float
    """largest absolute difference"""
    allowed: float
    """the most that `relative` may be"""

    @property
    def passed(self) -> bool:
        """Whether the difference is one of rounding; a NaN is not."""
        return self.relative <= self.allowed

    @property
    def row(self) -> str:
        """The block, or the whole place outside of blocks."""
        return self.place.split(".")[0]

    @property
    def site(self) -> str:
        """One of `SITES`; "" outside of blocks."""
        return self.place.partition(".")[2]


def check_activations(
    models: Models, tokens_BT: np.ndarray, dtype: DTypeLike = jnp.float32
) -> tuple[list[Check], dict[str, list[Difference]]]:
    """Compares every activation of JAX with both PyTorch models, which compute in float32.

    Args:
      models: the models.
      tokens_BT: token ids.
      dtype: what JAX computes in.

    Returns:
      A check for each of the two, which names the first place that differs, and all differences
      under the two models' names.
    """
    name = jnp.dtype(dtype).name
    ours = jax_activations(models.params, models.config, tokens_BT, dtype)
    theirs, errors, allowed = relative_errors(
        ours,
        models,
        lambda model: torch_activations(model, models.config, tokens_BT),
        name,
    )
    differences = {
        model: [
            Difference(
                place,
                array.shape,
                errors[model][place],
                float(np.abs(ours[place] - array).max()),
                allowed[place],
            )
            for place, array in arrays.items()
        ]
        for model, arrays in theirs.items()
    }
    checks = [_check(f"activations, JAX - {model}", d, name) for model, d in differences.items()]
    return checks, differences


def first_difference(differences: list[Difference]) -> Difference | None:
    """The first place with more than rounding between the two."""
    return next((difference for difference in differences if not difference.passed), None)


def _check(name: str, differences: list[Difference], dtype: str) -> Check:
    worst = max(differences, key=lambda d: np.nan_to_num(d.relative / d.allowed, nan=np.inf))
    first = first_difference(differences)
    details = () if first is None else (
        f"first at {first.place}, by {first.relative:.1e} of its norm, where rounding explains "
        f"{first.allowed:.0e}; the largest difference there is {first.largest:.1e}",
    )  # fmt: skip
    return Check(
        name, worst.relative, worst.allowed, worst.shape, dtype, where=worst.place, details=details
    )


def jax_activations(
    params: Params, config: GPT2Config, tokens_BT: np.ndarray, dtype: DTypeLike = jnp.float32
) -> Activations:
    """What the JAX model computes, float32, by place."""
    # The plain attention alone holds probabilities; it is what float32 and CPUs use anyway.
    model = GPT2(config, dtype=dtype, implementation="plain")
    run = jax.jit(
        functools.partial(model.apply, capture_intermediates=True, mutable=["intermediates"])
    )
    _, kept = run({"params": params}, jnp.asarray(tokens_BT, jnp.int32))
    values = {
        # A value is kept as a tuple with one entry a call; every module here is called once.
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/0"): value
        for path, value in jax.tree_util.tree_leaves_with_path(kept["intermediates"])
    }
    found = {"embedding": values["drop/__call__"]}
    for layer in range(config.n_layer):
        for site, (path, _) in SITES.items():
            found[f"h_{layer}.{site}"] = values[f"h_{layer}/{path}"]
    found |= {"ln_f": values["ln_f/__call__"], "logits": values["__call__"]}
    return {place: np.asarray(value, np.float32) for place, value in found.items()}


def torch_activations(
    model: torch.nn.Module, config: GPT2Config, tokens_BT: np.ndarray
) -> Activations:
    """What Hugging Face's model or the reference computes, float32 at least, by place."""
    found: dict[str, torch.Tensor] = {}
    with contextlib.ExitStack() as hooks, torch.no_grad():
        hooks.enter_context(_eager_attention(model))

        def keep(module: str, place: str, part: Callable[[Any], Any] = lambda out: out) -> None:
            """Keeps what goes into a module ("<name") or comes out of it."""
            submodule = model.get_submodule(module.removeprefix("<"))
            if module.startswith("<"):
                hook = submodule.register_forward_pre_hook(
                    lambda _, inputs: found.update({place: part(inputs[0])})
                )
            else:
                hook = submodule.register_forward_hook(
                    lambda _, __, output: found.update({place: part(output)})
                )
            hooks.callback(hook.remove)

        keep("transformer.drop", "embedding")
        for layer in range(config.n_layer):
            _keep_block(keep, model, config, layer)
        keep("transformer.ln_f", "ln_f")
        keep("lm_head", "logits")
        model(torch.from_numpy(np.asarray(tokens_BT, np.int64)))
    order = ["embedding", *(f"h_{i}.{site}" for i in range(config.n_layer) for site in SITES)]
    return {place: to_numpy(found[place]) for place in [*order, "ln_f", "logits"]}


def _keep_block(
    keep: Callable[..., None], model: torch.nn.Module, config: GPT2Config, layer: int
) -> None:
    def head_part(index: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def part(qkv_BTC: torch.Tensor) -> torch.Tensor:
            part_BTD = qkv_BTC.split(config.n_embd, dim=-1)[index]
            heads = (*part_BTD.shape[:2], config.n_head, config.head_width)
            return part_BTD.reshape(heads).transpose(1, 2)

        return part

    for site, (_, module) in SITES.items():
        before, name = ("<", module[1:]) if module.startswith("<") else ("", module)
        path = f"{before}transformer.h.{layer}.{name}".removesuffix(".")
        place = f"h_{layer}.{site}"
        if site in ("q", "k", "v"):
            keep(path, place, head_part("qkv".index(site)))
        elif site == "probabilities" and isinstance(model, transformers.GPT2LMHeadModel):
            keep(path, place, lambda output: output[1])
        elif site == "probabilities":
            keep(f"<{path}.attn_dropout", place)
        else:
            keep(path, place)


@contextlib.contextmanager
def _eager_attention(model: torch.nn.Module) -> Iterator[None]:
    """Lets Hugging Face's model compute attention step by step: fused, it has no probabilities."""
    if not isinstance(model, transformers.GPT2LMHeadModel):
        yield
        return
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(usual)
