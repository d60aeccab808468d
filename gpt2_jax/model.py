"""GPT-2: token ids in, logits out.

    tokens -> wte[token] + wpe[position] -> h_0 ... h_{L-1} -> ln_f -> logits

Both tables are learned, tokens (section 2.2 of the GPT-2 paper) and positions (as in GPT-1), and
added as they are, without the sqrt(D) and the sinusoids of Vaswani et al., 2017 (3.4, 3.5). The
head is wte once more: a token's logit is the product of the last feature and its embedding.

The parameter tree is named as Hugging Face names its weights, with "." turned into "_" where a
number follows, and every array is stored as there; converting is renaming:

    wte/embedding [V, D]               h_0/attn/c_attn/{kernel [D, 3D], bias [3D]}
    wpe/embedding [n_positions, D]     h_0/attn/c_proj/{kernel [D, D], bias [D]}
    h_0/ln_1/{scale, bias} [D]         h_0/mlp/c_fc/{kernel [D, F], bias [F]}
    h_0/ln_2/{scale, bias} [D]         h_0/mlp/c_proj/{kernel [F, D], bias [D]}
    ln_f/{scale, bias} [D]             lm_head/embedding [V, D], if the head is not tied

Shapes: B batch, T sequence, D width, F MLP width, V vocabulary, L layers.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gpt2_jax.attention import Branches, Implementation, KVCache, visible_in_branches
from gpt2_jax.block import Block
from gpt2_jax.config import GPT2Config
from gpt2_jax.layers import Embedding, LayerNorm
from gpt2_jax.packed import PackedParams

Params = dict[str, Any]
"""A parameter tree: nested dicts, named as the module's docstring lists them, with array leaves.
`init_params` makes one, float32; `load_pretrained` reads one."""


class AdaptedParams(NamedTuple):
    """Parameters with an adapter beside them, each the Flax collection of its name.

    Made by `gpt2_jax.lora.adapt`.
    """

    params: Params
    lora: Params


Remat = Literal["none", "dots", "block"]
"""Memory of the backward pass for a block, from most to least: everything; the results of the
matrix products, the rest computed again; the block's input alone (Chen et al., 2016)."""


class GPT2(nn.Module):
    """The language model of Radford et al., 2019.

    Examples:
      >>> model = GPT2(GPT2Config(n_embd=64, n_layer=2, n_head=2))
      >>> params = init_params(model.config, jax.random.key(0))
      >>> tokens_BT = jnp.array([[15496, 11, 616, 1438, 318]])  # "Hello, my name is"
      >>> logits_BTV = apply(model, params, tokens_BT)
      >>> logits_BTV.shape
      (1, 5, 50257)
    """

    config: GPT2Config
    """the architecture's hyperparameters"""
    dtype: DTypeLike = jnp.float32
    """compute dtype, see `gpt2_jax.precision`"""
    implementation: Implementation | None = None
    """attention implementation; None chooses by platform and dtype"""
    remat: Remat = "none"
    """what the backward pass computes again instead of remembering it, see `Remat`"""
    lora_dropout: float = 0.0
    """dropout before an adapter, where there is one"""

    def setup(self) -> None:
        """Declares the submodules."""
        config = self.config
        size, stddev = config.n_embd, config.initializer_range
        rows, padded = config.vocab_size, config.padded_vocab_size
        self.wte = Embedding(rows, size, stddev, self.dtype, padded)
        self.wpe = Embedding(config.n_positions, size, stddev, self.dtype)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = [
            Block(config, self.dtype, self.implementation, self.lora_dropout)
            for _ in range(config.n_layer)
        ]
        self.ln_f = LayerNorm(config.layer_norm_epsilon)
        if not config.tie_word_embeddings:
            self.lm_head = Embedding(rows, size, stddev, self.dtype, padded)

    def __call__(self, tokens_BT: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Predicts the next token at every position.

        Args:
          tokens_BT: token ids, T at most `config.n_positions`.
          deterministic: False applies dropout (needs an rng named "dropout").

        Returns:
          float32 logits [B, T, vocab_size]; the padding of the vocabulary never shows.
        """
        x_BTD, _ = self.features(tokens_BT, deterministic=deterministic)
        return self.logits(x_BTD)

    def features(
        self,
        tokens_BT: jax.Array,
        cache: KVCache | None = None,
        branches: Branches | None = None,
        *,
        deterministic: bool = True,
    ) -> tuple[jax.Array, KVCache | None]:
        """Runs all but the output head.

        With a cache, the tokens are taken to follow those already in it, row by row, and their
        keys and values are added. With `branches`, a row holds several texts that begin alike;
        T may then be more than `config.n_positions`, which their positions must be below.

        Returns:
          The normalised features [B, T, D] and the cache after these tokens.

        Raises:
          ValueError: if one text's T is more than `config.n_positions`; if both are given.
        """
        T = tokens_BT.shape[1]
        if self.config.n_positions < T and branches is None:
            raise ValueError(f"{T} tokens do not fit n_positions={self.config.n_positions}")
        if branches is not None and cache is not None:
            raise ValueError("branches go without a cache")
        start_B = mask_BTT = None
        if branches is not None:
            positions_BTD = self.wpe(branches.position_BT)
            mask_BTT = visible_in_branches(branches.branch_BT)
        elif cache is not None:
            start_B = cache.length_B
            positions_BTD = self.wpe(start_B[:, None] + jnp.arange(T)[None, :])
        else:
            positions_BTD = self.wpe.first_rows(T)[None]
        # The residual stream begins: what the token is, plus where it stands.
        x_BTD = self.wte(tokens_BT) + positions_BTD
        x_BTD = self.drop(x_BTD, deterministic=deterministic)
        layers = []
        for i, block in enumerate(self.h):
            if cache is None:
                x_BTD = self._run_block(block, x_BTD, mask_BTT, deterministic)
            else:
                x_BTD, layer = block(x_BTD, cache.layers[i], start_B, deterministic=deterministic)
                assert layer is not None
                layers.append(layer)
        if cache is not None:
            cache = KVCache(tuple(layers), cache.length_B + T)
        return self.ln_f(x_BTD), cache

    def _run_block(
        self, block: Block, x_BTD: jax.Array, mask_BTT: jax.Array | None, deterministic: bool
    ) -> jax.Array:
        """One block without a cache, rematerialised as `remat` says."""

        def run(block: Block, x_BTD: jax.Array) -> jax.Array:
            return block(x_BTD, mask_BTS=mask_BTT, deterministic=deterministic)[0]

        if self.remat == "none":
            return run(block, x_BTD)
        dots = jax.checkpoint_policies.checkpoint_dots if self.remat == "dots" else None
        return nn.remat(run, policy=dots)(block, x_BTD)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """The output head: features [B, T, D] to float32 logits [B, T, vocab_size]."""
        head = self.wte if self.config.tie_word_embeddings else self.lm_head
        return head.logits(x_BTD)


def apply(
    model: GPT2, params: Params | PackedParams | AdaptedParams, *args: Any, **kwargs: Any
) -> Any:
    """`model.apply` on parameters of any kind: `apply(model, params, tokens_BT)` gives logits.

    Other methods by name, `apply(model, params, x_BTD, method="logits")`; dropout with
    `deterministic=False, rngs={"dropout": key}`.
    """
    variables = {"params": params} if isinstance(params, dict) else params._asdict()
    return model.apply(variables, *args, **kwargs)


def head_table(params: Params | AdaptedParams, config: GPT2Config) -> jax.Array:
    """The output head [V, D], one row for each token and for the padding of the vocabulary."""
    if isinstance(params, AdaptedParams):
        params = params.params
    table_VD: jax.Array = params["wte" if config.tie_word_embeddings else "lm_head"]["embedding"]
    return table_VD


def init_params(config: GPT2Config, key: jax.Array) -> Params:
    """Draws the initial parameters, all float32.

    Weights are normal with `initializer_range`, as GPT-1's; those that end a residual branch are
    divided by sqrt(2L) (GPT-2 paper, section 2.3). Biases are zero, layer norm scales one.
    Positions are drawn like tokens, as by Hugging Face.
    """
    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    return GPT2(config).init(key, tokens_BT)["params"]


def param_shapes(config: GPT2Config) -> Params:
    """The parameter tree with `jax.ShapeDtypeStruct` leaves: nothing is computed or allocated."""
    one_layer = dataclasses.replace(config, n_layer=1)  # all blocks are alike; tracing takes time
    shapes = jax.eval_shape(lambda: init_params(one_layer, jax.random.key(0)))
    block = shapes.pop("h_0")
    return {
        **{f"h_{i}": jax.tree.map(lambda leaf: leaf, block) for i in range(config.n_layer)},
        **shapes,
    }
