"""The comparisons find what they are made for: planted faults, each named at its place."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.config import GPT2Config
from gpt2_jax.training import optimizer, step
from gpt2_jax.training.settings import OptimizerSettings
from parity.activations import check_activations, first_difference
from parity.adamw import check_optimizer, random_gradients
from parity.checks import check_state_dict
from parity.gradients import check_gradients
from parity.models import Models, random_models, random_tokens, trained_models
from parity.trajectory import (
    batches_of,
    check_trajectory,
    run_settings,
    train_in_jax,
    train_in_torch,
)

CONFIG = GPT2Config(
    vocab_size=101,
    n_positions=24,
    n_embd=32,
    n_layer=3,
    n_head=4,
    activation_function="gelu",
    initializer_range=0.2,
    eos_token_id=None,
)
SETTINGS = OptimizerSettings(warmup_steps=0)


@pytest.fixture(scope="module")
def models() -> Models:
    return random_models(CONFIG, seed=7)


@contextlib.contextmanager
def planted(path: str, method: str, fault: Callable[..., Any]) -> Iterator[None]:
    """Puts a fault in the place of one method of one of the JAX model's modules.

    It is called with the module, the method it replaces, and that method's arguments.
    """

    def intercept(
        call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        if (".".join(context.module.path), context.method_name) == (path, method):
            return fault(context.module, call, *args, **kwargs)
        return call(*args, **kwargs)

    with nn.intercept_methods(intercept):
        yield


def with_attribute(name: str, value: object) -> Callable[..., Any]:
    """The method of a module that has another value somewhere."""

    def fault(module: nn.Module, call: Callable, *args: Any, **kwargs: Any) -> Any:
        object.__setattr__(module, name, value)  # modules are frozen
        return call(*args, **kwargs)

    return fault


def not_scaled(module: Any, call: Callable, heads: str, q: jax.Array, *args: Any) -> Any:
    return call(heads, q * module.config.head_width**0.5, *args)


def one_further(module: Any, _: Callable, count: int) -> jax.Array:
    return module.embedding[1 : count + 1]


def sees_the_future(
    _: Any, call: Callable, heads: str, q: Any, k: Any, v: Any, mask: jax.Array, last: bool
) -> Any:
    return call(heads, q, k, v, jnp.roll(mask, 1, axis=-2), last)


ERF = dataclasses.replace(CONFIG, activation_function="gelu_new")
FAULTS = {
    "wrong eps": ("h_1.ln_2", "__call__", with_attribute("epsilon", 1e-3), "h_1.ln_2"),
    "wrong eps at the end": ("ln_f", "__call__", with_attribute("epsilon", 1e-3), "ln_f"),
    "tanh for erf": ("h_2.mlp", "__call__", with_attribute("config", ERF), "h_2.activation"),
    "missing 1/sqrt(d)": ("h_1.attn", "_plain", not_scaled, "h_1.probabilities"),
    "the next token seen": ("h_0.attn", "_plain", sees_the_future, "h_0.probabilities"),
    "off-by-one position": ("wpe", "first_rows", one_further, "embedding"),
}


@pytest.mark.parametrize(
    ("path", "method", "fault", "place"), FAULTS.values(), ids=list(FAULTS.keys())
)
def test_a_fault_in_jax_is_found_where_it_is(
    models: Models, path: str, method: str, fault: Callable[..., Any], place: str
) -> None:
    with planted(path, method, fault):
        checks, differences = check_activations(models, random_tokens(CONFIG, (2, 20)))
    for check, found in zip(checks, differences.values(), strict=True):
        first = first_difference(found)
        assert not check.passed
        assert first is not None
        assert first.place == place
        assert check.details[0].startswith(f"first at {place}, ")


@pytest.mark.parametrize(
    ("block", "module", "name", "place"),
    [
        ("h_1", "attn", "c_proj", "h_1.attention"),
        ("h_0", "mlp", "c_fc", "h_0.c_fc"),
    ],
)
def test_a_transposed_kernel_is_found_where_it_is(
    block: str, module: str, name: str, place: str
) -> None:
    models = random_models(dataclasses.replace(CONFIG, n_inner=CONFIG.n_embd), seed=8)
    params = jax.tree.map(lambda array: array, models.params)
    params[block][module][name]["kernel"] = params[block][module][name]["kernel"].T
    faulty = dataclasses.replace(models, params=params)
    checks, _ = check_activations(faulty, random_tokens(CONFIG, (2, 20)))
    assert all(check.details[0].startswith(f"first at {place}, ") for check in checks)
    [detail] = check_state_dict(faulty).details
    assert detail.startswith(f"transformer.{block.replace('_', '.')}.{module}.{name}.weight ")


def test_a_fault_in_the_reference_is_told_from_one_in_jax() -> None:
    models = random_models(CONFIG, seed=7)
    models.reference.get_submodule("transformer.h.1.ln_1").eps = 1e-3  # type: ignore[assignment]
    huggingface, reference = check_activations(models, random_tokens(CONFIG, (2, 20)))[0]
    assert huggingface.passed
    assert not reference.passed
    assert reference.details[0].startswith("first at h_1.ln_1, ")


def test_a_number_that_is_none_is_no_parity(models: Models) -> None:
    params = jax.tree.map(lambda array: array, models.params)
    params["h_1"]["attn"]["c_attn"]["bias"] = (
        params["h_1"]["attn"]["c_attn"]["bias"].at[2].set(jnp.nan)
    )
    faulty = dataclasses.replace(models, params=params)
    checks, _ = check_activations(faulty, random_tokens(CONFIG, (2, 20)))
    assert all(check.details[0].startswith("first at h_1.q, ") for check in checks)


def test_a_gradient_cut_off_is_found_nearest_to_the_loss(models: Models) -> None:
    """Logits and loss are right, and so are the gradients after the cut."""

    def cut(_: Any, call: Callable, x_BTD: jax.Array, **options: Any) -> Any:
        return call(jax.lax.stop_gradient(x_BTD), **options)

    with planted("h_1.mlp.c_fc", "__call__", cut):
        checks = check_gradients(models, random_tokens(CONFIG, (2, 21)))
        activations, _ = check_activations(models, random_tokens(CONFIG, (2, 20)))
    assert all(check.passed for check in activations)
    for check in checks:
        assert not check.passed
        assert check.details[0].startswith("transformer.h.1.ln_2.bias differs")
        assert not any("h.2." in detail or "c_fc" in detail for detail in check.details[:2])


@pytest.mark.parametrize("place", ["h_0.ln_1", "h_2.ln_2", "ln_f"])
def test_a_usual_eps_for_another_is_found(place: str) -> None:
    """In small activations, where it outweighs the variance; in larger ones it has no effect."""
    models = random_models(dataclasses.replace(CONFIG, initializer_range=1e-3), seed=9)
    with planted(place, "__call__", with_attribute("epsilon", 1e-6)):
        checks, _ = check_activations(models, random_tokens(CONFIG, (2, 20)))
    assert all(check.details[0].startswith(f"first at {place}, ") for check in checks)


def test_a_difference_from_nothing_is_found(models: Models) -> None:
    """A branch that is zero in PyTorch has no norm to be relative to."""
    params = jax.tree.map(lambda array: array, models.params)
    params["h_1"]["mlp"]["c_proj"] = jax.tree.map(jnp.zeros_like, params["h_1"]["mlp"]["c_proj"])
    silent = trained_models(params, CONFIG)
    assert all(check.passed for check in check_activations(silent, np.ones((1, 3), int))[0])
    bias_D = params["h_1"]["mlp"]["c_proj"]["bias"] + 1e-3
    params["h_1"]["mlp"]["c_proj"]["bias"] = bias_D
    checks, _ = check_activations(dataclasses.replace(silent, params=params), np.ones((1, 3), int))
    assert all(check.details[0].startswith("first at h_1.mlp, ") for check in checks)


def test_a_sum_of_gradients_for_their_mean_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipping and AdamW undo it, so that losses and parameters are right."""
    models = random_models(CONFIG, seed=7)
    settings = run_settings(models, 3, optimizer=SETTINGS)
    batches = batches_of(settings)
    loss = step.batch_loss

    def of_double_gradient(*args: Any, **kwargs: Any) -> jax.Array:
        once = loss(*args, **kwargs)
        return 2 * once - jax.lax.stop_gradient(once)

    monkeypatch.setattr(step, "batch_loss", of_double_gradient)
    ours = train_in_jax(models, settings, batches)
    losses, norms = check_trajectory(ours, train_in_torch(models, settings, batches))
    assert losses.passed
    assert norms.details[0].startswith("they part at step 0: 2.0")


def optimize_with(monkeypatch: pytest.MonkeyPatch, **changes: float) -> None:
    """Has JAX's optimizer compute with other settings than it is given."""
    update = optimizer._update
    monkeypatch.setattr(
        optimizer,
        "_update",
        lambda settings, *args: update(dataclasses.replace(settings, **changes), *args),
    )


def failures(models: Models, steps: int = 1) -> dict[str, tuple[str, ...]]:
    checks = check_optimizer(models, random_gradients(models, steps), SETTINGS)
    return {check.name: check.details for check in checks if not check.passed}


def test_decay_of_biases_and_norms_is_found(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = functools.partial(jax.tree.map, lambda _: True)
    monkeypatch.setattr(optimizer, "decay_mask", everything)
    [(name, details)] = failures(models).items()
    assert name == "AdamW, first step: parameters"
    vectors = {name for name, p in models.reference.named_parameters() if p.ndim == 1}
    assert {detail.split()[3] for detail in details} == vectors


@pytest.mark.parametrize(
    ("changes", "state"),
    [({"beta2": 0.999}, "exp_avg_sq"), ({"beta1": 0.8}, "exp_avg")],
    ids=["beta2", "beta1"],
)
def test_a_wrong_beta_is_found_in_the_first_step(
    models: Models, monkeypatch: pytest.MonkeyPatch, changes: dict, state: str
) -> None:
    """Bias correction hides it from the parameters, not from the state."""
    optimize_with(monkeypatch, **changes)
    found = failures(models)
    assert list(found) == [f"AdamW, first step: {state}"]
    assert "AdamW, later steps: parameters" in failures(models, steps=2)


def test_a_wrong_schedule_is_found(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = optimizer.learning_rate_schedule
    monkeypatch.setattr(
        optimizer,
        "learning_rate_schedule",
        lambda *args: lambda step: schedule(*args)(step + 1),
    )
    assert "AdamW, first step: learning rate" in failures(models)


def test_a_gradient_not_clipped_is_found(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    optimize_with(monkeypatch, clip_norm=1e9)
    assert "AdamW, first step: exp_avg" in failures(models)
