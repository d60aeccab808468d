"""LoRA: the formula, which layers a name means, and a base that stays what it was."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from gpt2_jax.config import SIZES, GPT2Config
from gpt2_jax.errors import UserError
from gpt2_jax.lora import adapt, lora_shapes, merge, unmerge
from gpt2_jax.lora_settings import TARGETS, LoraSettings, adapted_layers
from gpt2_jax.model import GPT2, apply, param_shapes

PATTERNED = LoraSettings(
    targets=TARGETS,
    rank=3,
    alpha=5.0,
    rs_lora=True,
    rank_pattern=(("h_1.attn.c_proj", 6), ("c_proj", 2)),
    alpha_pattern=(("mlp.c_fc", 0.5), ("h_1.mlp.c_fc", 9.0)),
)


def random_lora(config, settings, seed=5):
    """Values between -1 and 1, as if trained for long: neither matrix is zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(-1, 1, leaf.shape), jnp.float32),
        lora_shapes(config, settings),
    )


@pytest.mark.parametrize("n_inner", [None, 40])
def test_an_adapter_is_named_and_shaped_as_the_kernels_are(tiny_config, n_inner):
    config = dataclasses.replace(tiny_config, n_inner=n_inner)
    params = traverse_util.flatten_dict(param_shapes(config), sep="/")
    lora = traverse_util.flatten_dict(lora_shapes(config, LoraSettings(TARGETS, rank=3)), sep="/")
    kernels = [path for path in params if path.endswith("/kernel")]
    assert len(kernels) == 8
    assert len(lora) == 16
    for path in kernels:
        a, b = (lora[path.replace("kernel", factor)] for factor in ("lora_a", "lora_b"))
        assert (a.shape[0], b.shape[1]) == params[path].shape
        assert (a.shape[1], b.shape[0]) == (3, 3)
        assert a.dtype == b.dtype == np.float32


def test_the_defaults_are_pefts_for_gpt2():
    lora = lora_shapes(GPT2Config(), LoraSettings())
    assert set(lora) == {f"h_{block}" for block in range(12)}
    assert lora["h_0"] == {
        "attn": {
            "c_attn": {
                "lora_a": jax.ShapeDtypeStruct((768, 8), jnp.float32),
                "lora_b": jax.ShapeDtypeStruct((8, 2304), jnp.float32),
            }
        }
    }
    assert LoraSettings().scaling("h_0.attn.c_attn") == 1.0


@pytest.mark.parametrize(
    "settings",
    [
        LoraSettings(rank=4, alpha=6.0),
        LoraSettings(("mlp.c_proj", "attn.c_proj"), rank=4, alpha=6.0, rs_lora=True),
        LoraSettings(("h_1.mlp.c_fc",), rank=70, alpha=2.0),
        PATTERNED,
    ],
    ids=["default target", "rs_lora", "one layer, full rank", "patterns"],
)
def test_merging_adds_the_scaled_product_to_adapted_kernels_alone(
    tiny_config, tiny_params, settings
):
    lora = random_lora(tiny_config, settings)
    merged = traverse_util.flatten_dict(merge(tiny_params, lora, settings), sep=".")
    factors = traverse_util.flatten_dict(lora, sep=".")
    adapted = adapted_layers(tiny_config, settings)
    for path, base in traverse_util.flatten_dict(tiny_params, sep=".").items():
        layer, _, leaf = path.rpartition(".")
        if layer not in adapted or leaf != "kernel":
            assert merged[path] is base
            continue
        a_IR, b_RO = (np.float64(factors[f"{layer}.{name}"]) for name in ("lora_a", "lora_b"))
        expected = np.float64(base) + settings.scaling(layer) * (a_IR @ b_RO)
        # Sums of up to 70 products below 1, times a factor of a few: float32 rounding.
        np.testing.assert_allclose(merged[path], expected, rtol=0, atol=5e-6)
        assert merged[path].dtype == np.float32
        assert np.abs(merged[path] - base).max() > 0.1


def test_the_base_is_untouched(tiny_config, tiny_params):
    before = jax.tree.map(np.array, tiny_params)
    merge(tiny_params, random_lora(tiny_config, PATTERNED), PATTERNED)
    jax.tree.map(np.testing.assert_array_equal, tiny_params, before)


def test_an_adapter_whose_b_is_zero_changes_nothing(tiny_config, tiny_params):
    """As every adapter is before its first step."""
    lora = random_lora(tiny_config, PATTERNED)
    lora = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if path[-1].key == "lora_b" else leaf, lora
    )
    merged = merge(tiny_params, lora, PATTERNED)
    jax.tree.map(np.testing.assert_array_equal, merged, tiny_params)


def test_merging_compiles(shallow_config, shallow_params):
    settings = LoraSettings(rank=2)
    lora = random_lora(shallow_config, settings)
    merged = jax.jit(merge, static_argnums=2)(shallow_params, lora, settings)
    expected = merge(shallow_params, lora, settings)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, expected)


def test_scaling_follows_the_layers_own_rank_and_alpha():
    assert LoraSettings(rank=4, alpha=6.0).scaling("h_0.attn.c_attn") == 1.5
    assert LoraSettings(rank=4, alpha=6.0, rs_lora=True).scaling("h_0.attn.c_attn") == 3.0
    assert PATTERNED.rank_of("h_0.attn.c_attn") == 3
    assert PATTERNED.rank_of("h_1.attn.c_proj") == 6
    assert PATTERNED.rank_of("h_0.attn.c_proj") == PATTERNED.rank_of("h_1.mlp.c_proj") == 2
    assert PATTERNED.scaling("h_1.attn.c_proj") == 5.0 / math.sqrt(6)
    # The first name that fits counts.
    assert PATTERNED.scaling("h_1.mlp.c_fc") == 0.5 / math.sqrt(3)


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (("c_fc",), ["h_0.mlp.c_fc", "h_1.mlp.c_fc"]),
        (
            ("c_proj",),
            ["h_0.attn.c_proj", "h_0.mlp.c_proj", "h_1.attn.c_proj", "h_1.mlp.c_proj"],
        ),
        (("h_1.mlp.c_fc", "attn.c_attn"), ["h_0.attn.c_attn", "h_1.attn.c_attn", "h_1.mlp.c_fc"]),
    ],
)
def test_a_short_name_means_every_layer_that_ends_in_it(tiny_config, targets, layers):
    assert adapted_layers(tiny_config, LoraSettings(targets)) == layers


def test_a_block_is_not_taken_for_another_that_ends_alike():
    settings = LoraSettings(("h_1.attn.c_attn",))
    assert adapted_layers(SIZES["gpt2-xl"], settings) == ["h_1.attn.c_attn"]


@pytest.mark.parametrize("target", ["q_proj", "attn", "h_2.attn.c_attn", "_attn", "ln_1", ""])
def test_a_target_that_is_no_layer_is_refused(tiny_config, target):
    settings = LoraSettings(("attn.c_attn", target))
    with pytest.raises(UserError, match=rf"target '{target}' is no linear .* h_0 to h_1$"):
        lora_shapes(tiny_config, settings)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": -1}, "rank=-1"),
        ({"rank": 2.0}, r"rank=2\.0"),
        ({"rank": True}, "rank=True"),
        ({"rank_pattern": (("c_fc", 0),)}, "rank=0"),
        ({"alpha": 0}, "alpha=0"),
        ({"alpha": -2.0}, r"alpha=-2\.0"),
        ({"alpha": math.nan}, "alpha=nan"),
        ({"alpha": math.inf}, "alpha=inf"),
        ({"alpha": 10**400}, "alpha=10"),
        ({"alpha": "16"}, "alpha='16'"),
        ({"alpha_pattern": (("c_fc", 0.0),)}, r"alpha=0\.0"),
        ({"targets": ()}, r"targets is empty; .* attn\.c_attn"),
    ],
)
def test_settings_out_of_range_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        LoraSettings(**fields)


def test_merged_and_beside_give_the_same_logits_and_merging_can_be_undone(tiny_config, tiny_params):
    lora = jax.tree.map(lambda leaf: 0.2 * leaf, random_lora(tiny_config, PATTERNED))
    tokens_BT = jnp.arange(64).reshape(2, 32)
    forward = jax.jit(functools.partial(apply, GPT2(tiny_config)))
    merged = merge(tiny_params, lora, PATTERNED)
    beside_BTV = forward(adapt(tiny_params, lora, PATTERNED), tokens_BT)
    np.testing.assert_allclose(forward(merged, tokens_BT), beside_BTV, rtol=1e-5, atol=1e-5)
    assert np.abs(forward(tiny_params, tokens_BT) - beside_BTV).max() > 0.1
    back = unmerge(merged, lora, PATTERNED)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), back, tiny_params)
