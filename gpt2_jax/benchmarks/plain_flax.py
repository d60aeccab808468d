"""The training step as one first writes it in Flax and Optax: what our own is measured against.

Layers, attention, loss and optimizer are the libraries' own, in the simplest form that is right.
Names are those of `gpt2_jax.model`, so that the same parameters fit.

Shapes: B batch, T sequence, D width, H heads, K head width, V vocabulary, N passes.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from gpt2_jax.benchmarks.jax_trainers import JaxTrainer
from gpt2_jax.benchmarks.model_files import random_params
from gpt2_jax.benchmarks.random_start import random_tokens
from gpt2_jax.config import GPT2Config
from gpt2_jax.model import Params, param_shapes
from gpt2_jax.training.settings import OptimizerSettings, TrainSettings


class PlainAttention(nn.Module):
    """Causal self-attention by two einsums, a mask and a softmax."""

    config: GPT2Config
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]."""
        config, (B, T, D) = self.config, x_BTD.shape
        qkv = nn.Dense(3 * D, dtype=self.dtype, name="c_attn")(x_BTD)
        heads = (B, T, config.n_head, config.head_width)
        q_BTHK, k_BTHK, v_BTHK = (part.reshape(heads) for part in jnp.split(qkv, 3, axis=-1))
        scores_BHTT = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BTHK) * config.head_width**-0.5
        visible_TT = jnp.tril(jnp.ones((T, T), bool))
        scores_BHTT = jnp.where(visible_TT[None, None], scores_BHTT.astype(jnp.float32), -jnp.inf)
        att_BHTT = nn.softmax(scores_BHTT).astype(self.dtype)
        y_BTHK = jnp.einsum("BHTS,BSHK->BTHK", att_BHTT, v_BTHK)
        return nn.Dense(D, dtype=self.dtype, name="c_proj")(y_BTHK.reshape(B, T, D))


class PlainMLP(nn.Module):
    """Two dense layers with a GELU between."""

    config: GPT2Config
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]."""
        hidden_BTF = nn.Dense(self.config.mlp_width, dtype=self.dtype, name="c_fc")(x_BTD)
        hidden_BTF = nn.gelu(hidden_BTF, approximate=True)
        return nn.Dense(x_BTD.shape[-1], dtype=self.dtype, name="c_proj")(hidden_BTF)


class PlainBlock(nn.Module):
    """Pre-norm block."""

    config: GPT2Config
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Maps the residual stream [B, T, D] to the next."""
        norm = functools.partial(
            nn.LayerNorm, epsilon=self.config.layer_norm_epsilon, dtype=self.dtype
        )
        x_BTD = x_BTD + PlainAttention(self.config, self.dtype, name="attn")(
            norm(name="ln_1")(x_BTD)
        )
        return x_BTD + PlainMLP(self.config, self.dtype, name="mlp")(norm(name="ln_2")(x_BTD))


class PlainGPT2(nn.Module):
    """GPT-2 without dropout, by Flax's own layers and mixed precision."""

    config: GPT2Config
    dtype: DTypeLike

    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Maps token ids [B, T] to float32 logits [B, T, V]."""
        config, T = self.config, tokens_BT.shape[1]
        embed = functools.partial(nn.Embed, features=config.n_embd, dtype=self.dtype)
        wte = embed(config.padded_vocab_size, name="wte")
        wpe = embed(config.n_positions, name="wpe")
        x_BTD = wte(tokens_BT) + wpe(jnp.arange(T)[None])
        for i in range(config.n_layer):
            x_BTD = PlainBlock(config, self.dtype, name=f"h_{i}")(x_BTD)
        epsilon = config.layer_norm_epsilon
        x_BTD = nn.LayerNorm(epsilon=epsilon, dtype=self.dtype, name="ln_f")(x_BTD)
        if not config.tie_word_embeddings:
            wte = embed(config.padded_vocab_size, name="lm_head")
        return wte.attend(x_BTD).astype(jnp.float32)[..., : config.vocab_size]


def plain_loss(params: Params, tokens_BT: jax.Array, *, model: PlainGPT2) -> jax.Array:
    """Mean cross-entropy of a batch int32 [B, T + 1], nats per token."""
    logits_BTV = model.apply({"params": params}, tokens_BT[:, :-1])
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BT[:, 1:])
    return losses_BT.mean()


def plain_step(
    params: Params,
    opt_state: optax.OptState,
    tokens_NBT: jax.Array,
    *,
    model: PlainGPT2,
    optimizer: optax.GradientTransformation,
) -> tuple[Params, optax.OptState, jax.Array]:
    """One optimizer step; of several passes the gradients are accumulated."""
    loss_and_gradient = jax.value_and_grad(functools.partial(plain_loss, model=model))
    total = loss_and_gradient(params, tokens_NBT[0])
    if len(tokens_NBT) > 1:

        def accumulate(total: Any, tokens_BT: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, loss_and_gradient(params, tokens_BT)), None

        total, _ = jax.lax.scan(accumulate, total, tokens_NBT[1:])
    loss, gradient = jax.tree.map(lambda value: value / len(tokens_NBT), total)
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


def plain_optimizer(settings: OptimizerSettings) -> optax.GradientTransformation:
    """Clipping and AdamW at a constant rate; matrices and embeddings decay."""
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(
            settings.learning_rate,
            b1=settings.beta1,
            b2=settings.beta2,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            mask=lambda params: jax.tree.map(lambda array: array.ndim > 1, params),
        ),
    )


class PlainTrainer(JaxTrainer):
    """The step above, compiled. See `Trainer`."""

    def __init__(self, settings: TrainSettings) -> None:
        if settings.model.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
            raise ValueError(f"written for gelu_new, not {settings.model.activation_function}")
        self._optimizer = plain_optimizer(settings.optimizer)
        super().__init__(settings, self._lower)

    def load(self) -> None:
        """See `Trainer`."""
        params = jax.device_put(random_params(self._settings.model))
        self._state = params, jax.jit(self._optimizer.init)(params)
        self._tokens_NBT = jax.device_put(random_tokens(self._settings))
        jax.block_until_ready((self._state, self._tokens_NBT))

    def _lower(self) -> jax.stages.Lowered:
        settings = self._settings
        step = functools.partial(
            plain_step,
            model=PlainGPT2(settings.model, jnp.dtype(settings.dtype)),
            optimizer=self._optimizer,
        )
        params = param_shapes(settings.model)
        opt_state = jax.eval_shape(self._optimizer.init, params)
        tokens_NBT = jax.eval_shape(lambda: jnp.asarray(random_tokens(settings)))
        # All others' float32 is float32, too, where a GPU would round it to TensorFloat-32.
        with jax.default_matmul_precision("highest" if settings.dtype == "float32" else "default"):
            return jax.jit(step, donate_argnums=(0, 1)).lower(params, opt_state, tokens_NBT)

    def _step(self) -> jax.Array:
        params, opt_state, loss = self._compiled(*self._state, self._tokens_NBT)
        self._state = params, opt_state
        return loss
