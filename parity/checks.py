"""The comparisons that prove parity, used by the tests and by `scripts/validate.py` alike."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn import functional

from gpt2_jax.generation.decode import generate, room
from gpt2_jax.interop.huggingface import state_dict_from_params
from gpt2_jax.model import GPT2, apply
from gpt2_jax.training.loss import cross_entropy
from parity.models import Models
from parity.outcomes import Check, bounded

LOGITS_BOUND = 1e-4
"""Largest absolute difference of float32 logits, up to the 124M shape: rounding in 12 layers
of 768-term sums. The real weights' logits are about 100, where one float32 ulp is 7.6e-6."""
LOSS_BOUND = {"float32": 1e-5, "bfloat16": 5e-3}
"""Largest absolute difference of mean losses of about 10, by what JAX computes in. One float32 ulp
is 9.5e-7 there; the logits of a bfloat16 model are off by 1 %, and errors of many partly cancel."""


def check_state_dict(models: Models) -> Check:
    """Every key, shape and value of Hugging Face's state dict is that of the JAX tree."""
    theirs = {name: tensor.numpy() for name, tensor in models.huggingface.state_dict().items()}
    ours = state_dict_from_params(models.params, models.config)
    problems = [f"{name} is extra in JAX" for name in ours if name not in theirs]
    for name, weight in theirs.items():
        if name not in ours:
            problems.append(f"{name} is missing in JAX")
        elif weight.shape != ours[name].shape:
            problems.append(f"{name} has shape {ours[name].shape} in JAX, not {weight.shape}")
        elif not np.array_equal(weight, ours[name]):
            largest = np.abs(weight - ours[name]).max()
            problems.append(f"{name} differs by up to {largest:.1e}")
    counted = f"{len(theirs) - len(problems)} of {len(theirs)} weights equal"
    count = (len(theirs),)
    return Check("state dict", len(problems), 0, count, counted=counted, details=tuple(problems))


def check_logits(models: Models, tokens_BT: np.ndarray, bound: float = LOGITS_BOUND) -> list[Check]:
    """float32 logits of JAX against Hugging Face and against the reference."""
    return compare_logits(jax_logits(models, tokens_BT), torch_logits(models, tokens_BT), bound)


def compare_logits(
    ours_BTV: np.ndarray, theirs: dict[str, np.ndarray], bound: float = LOGITS_BOUND
) -> list[Check]:
    """Logits of JAX against those of PyTorch models by name."""
    return [
        bounded(f"logits, JAX - {name}", theirs_BTV, ours_BTV, bound)
        for name, theirs_BTV in theirs.items()
    ]


def check_loss(
    models: Models, tokens_BT: np.ndarray, dtype: str = "float32", bound: float | None = None
) -> list[Check]:
    """Mean next-token loss over tokens [B, T + 1] of JAX in a dtype, the two others in float32."""
    bound = LOSS_BOUND[dtype] if bound is None else bound
    inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
    logits_BTV = jnp.asarray(jax_logits(models, inputs_BT, dtype))
    ours = cross_entropy(logits_BTV, jnp.asarray(targets_BT)).mean()
    targets = torch.from_numpy(targets_BT.astype(np.int64)).flatten()
    checks = []
    for name, logits in torch_logits(models, inputs_BT).items():
        loss = functional.cross_entropy(torch.from_numpy(logits).flatten(0, 1), targets)
        checks.append(bounded(f"loss, JAX - {name}", loss.numpy(), ours, bound, dtype))
    return checks


def check_greedy(models: Models, prompt: Sequence[int], max_new_tokens: int) -> Check:
    """Greedy continuations agree token for token with Hugging Face's `generate`."""
    ours, theirs = greedy_texts(models, prompt, max_new_tokens)
    return compare_tokens("greedy tokens", ours, theirs)


def greedy_texts(
    models: Models, prompt: Sequence[int], max_new_tokens: int
) -> tuple[list[int], list[int]]:
    """New tokens of JAX and of Hugging Face, each with its own cache."""
    [ours] = generate(models.params, models.config, [prompt], max_new_tokens=max_new_tokens)
    return ours, huggingface_greedy(models, prompt, max_new_tokens)


def compare_tokens(name: str, ours: Sequence[int], theirs: Sequence[int]) -> Check:
    """Whether two continuations are the same; names the first place where they are not."""
    same = equal_at_first(ours, theirs)
    details = () if list(ours) == list(theirs) else (
        f"token {same}: {list(ours[same:same + 1])} in JAX, not {list(theirs[same:same + 1])}",
    )  # fmt: skip
    counted = f"{same} of {len(theirs)} equal"
    return Check(name, len(details), 0, (len(theirs),), counted=counted, details=details)


def equal_at_first(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens are the same before the first that differs."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


def jax_logits(models: Models, tokens_BT: np.ndarray, dtype: str = "float32") -> np.ndarray:
    """float32 logits [B, T, V] of the JAX model that computes in a dtype, jitted."""
    model = GPT2(models.config, dtype=jnp.dtype(dtype))
    jitted = jax.jit(functools.partial(apply, model))
    return np.asarray(jitted(models.params, jnp.asarray(tokens_BT, jnp.int32)))


def torch_logits(models: Models, tokens_BT: np.ndarray) -> dict[str, np.ndarray]:
    """float32 logits [B, T, V] of both PyTorch models."""
    tokens = torch.from_numpy(np.asarray(tokens_BT, np.int64))
    with torch.no_grad():
        return {
            "Hugging Face": models.huggingface(tokens).logits.numpy(),
            "reference": models.reference(tokens).numpy(),
        }


def huggingface_greedy(models: Models, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """New tokens of Hugging Face's own `generate`, with its own cache."""
    tokens = torch.tensor([list(prompt)])
    out = models.huggingface.generate(  # type: ignore[misc]
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=min(max_new_tokens, room(models.config, len(prompt))),
        do_sample=False,
        pad_token_id=models.config.eos_token_id or 0,
    )
    return out[0, len(prompt) :].tolist()
