"""The optimizer of `gpt2_jax/training/optimizer.py` in plain PyTorch, and the two compared."""

import copy
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
import optax
import torch

from gpt2_jax.interop.huggingface import params_from_state_dict, stored_state_dict
from gpt2_jax.model import Params
from gpt2_jax.training import optimizer as ours
from gpt2_jax.training.settings import OptimizerSettings
from parity.gradients import Gradients
from parity.models import Models
from parity.outcomes import Check, bounded, bounded_each, relative_error
from parity.reference import ReferenceGPT2

PARAMETER_BOUND = 1e-6
"""Largest absolute difference of a parameter after a step from the same gradient."""
RATE_BOUND = 1e-6
"""Largest difference of the learning rate, as a share of its peak."""
MOMENT_BOUND = 1e-5
"""Largest relative error of a parameter's moment, and of the norm before clipping: PyTorch scales
by norm + 1e-6, Optax by norm."""


class TorchAdamW:
    """build-nanogpt's optimizer: clipping, `torch.optim.AdamW` in two groups, its schedule."""

    def __init__(self, model: ReferenceGPT2, settings: OptimizerSettings, steps: int) -> None:
        self._settings, self._steps, self._done = settings, steps, 0
        self.parameters = dict(model.named_parameters())
        matrices = [p for p in self.parameters.values() if p.ndim >= 2]
        vectors = [p for p in self.parameters.values() if p.ndim < 2]
        self.adamw = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": settings.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=0.0,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
        )

    def learning_rate(self) -> float:
        """The rate of the step to come."""
        settings, step = self._settings, self._done
        peak, final, warmup = (
            settings.learning_rate,
            settings.final_learning_rate,
            settings.warmup_steps,
        )
        if step < warmup:
            return peak * (step + 1) / warmup
        progress = (step - warmup) / max(self._steps - warmup, 1)
        return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2

    def step(self) -> float:
        """Applies the gradients that the parameters hold; returns their norm before clipping."""
        for group in self.adamw.param_groups:
            group["lr"] = self.learning_rate()
        parameters = list(self.parameters.values())
        norm = global_norm(parameters)
        torch.nn.utils.clip_grads_with_norm_(parameters, self._settings.clip_norm, norm)
        self.adamw.step()
        self.adamw.zero_grad()
        self._done += 1
        return float(norm)

    def moment(self, name: str) -> dict[str, np.ndarray]:
        """One of "exp_avg" and "exp_avg_sq", by parameter."""
        return {w: self.adamw.state[p][name].numpy() for w, p in self.parameters.items()}


def global_norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """Norm of all gradients together, float64.

    PyTorch's own adds up squares in float32; of an embedding's 38 million gradients it finds, on a
    CPU, a norm that is off by 0.3 %.
    """
    norms = [
        torch.linalg.vector_norm(p.grad, dtype=torch.float64)
        for p in parameters
        if p.grad is not None
    ]
    return torch.linalg.vector_norm(torch.stack(norms))


def check_optimizer(
    models: Models, gradients: Sequence[Gradients], settings: OptimizerSettings, steps: int = 100
) -> list[Check]:
    """Steps of both optimizers from the same gradients, and all of their state, compared.

    Each gets the same gradients since AdamW's first step is by their sign: where one is but
    rounding, two runs of one program would differ as well.

    Args:
      models: whose parameters are stepped; they themselves stay as they are.
      gradients: one for each step, by Hugging Face's names.
      settings: the optimizer.
      steps: length of the run that the schedule is made for.

    Returns:
      Checks of the learning rate, the norm before clipping, both moments and the parameters, for
      each step.
    """
    config = models.config
    theirs = TorchAdamW(copy.deepcopy(models.reference), settings, steps)
    schedule = ours.learning_rate_schedule(settings, steps)
    adamw = ours.make_optimizer(settings, schedule)
    params, state = models.params, adamw.init(models.params)

    @jax.jit
    def update(gradient: Params, state: optax.OptState, params: Params) -> tuple[Any, ...]:
        updates, state = adamw.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, optax.tree.norm(gradient)

    checks = []
    for index, gradient in enumerate(gradients):
        label = f"AdamW, {'first step' if index == 0 else 'later steps'}"
        rate, peak = theirs.learning_rate(), settings.learning_rate
        for name, parameter in theirs.parameters.items():
            parameter.grad = torch.tensor(gradient[name])
        norm = theirs.step()
        tree = params_from_state_dict(gradient, config, "the gradients")
        params, state, our_norm = update(tree, state, params)
        mean, square = (
            stored_state_dict(optax.tree.get(state, name), config) for name in ("mu", "nu")
        )
        found = {
            # The schedule is computed in float32.
            "learning rate": bounded("", rate / peak, schedule(index) / peak, RATE_BOUND),
            "gradient norm": bounded("", norm / (norm or 1), our_norm / (norm or 1), MOMENT_BOUND),
            "exp_avg": _moment(theirs, "exp_avg", mean),
            "exp_avg_sq": _moment(theirs, "exp_avg_sq", square),
            "parameters": _parameters(theirs, stored_state_dict(params, config)),
        }
        checks += [
            dataclasses.replace(
                check,
                name=f"{label}: {name}",
                where=f"step {index + 1} {check.where}".strip(),
                details=tuple(f"after step {index + 1}, {detail}" for detail in check.details),
            )
            for name, check in found.items()
        ]
    return checks


def random_gradients(models: Models, count: int, norm: float = 3.0) -> list[Gradients]:
    """Normal gradients whose global norm is about `norm`, so that they are clipped."""
    rng = np.random.default_rng(0)
    shapes = {name: p.shape for name, p in models.reference.named_parameters()}
    size = sum(math.prod(shape) for shape in shapes.values())
    scale = np.float32(norm / math.sqrt(size))
    return [
        {name: scale * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        for _ in range(count)
    ]


def _moment(theirs: TorchAdamW, name: str, found: Gradients) -> Check:
    errors = {w: relative_error(found[w], array) for w, array in theirs.moment(name).items()}
    return bounded_each(name, errors, found, dict.fromkeys(errors, MOMENT_BOUND))


def _parameters(theirs: TorchAdamW, found: Gradients) -> Check:
    errors = {
        name: float(np.abs(found[name] - parameter.detach().numpy()).max())
        for name, parameter in theirs.parameters.items()
    }
    return bounded_each("parameters", errors, found, dict.fromkeys(errors, PARAMETER_BOUND))
