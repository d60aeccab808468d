"""Model FLOPs utilization: the operations a token needs, over the most a device can do."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from gpt2_jax.config import GPT2Config
from gpt2_jax.training.throughput import flops_per_token, mfu, peak_flops

GPT2_SMALL = GPT2Config()


def test_a_token_of_gpt2_takes_six_operations_a_weight_and_attention():
    # wte 50257 x 768 = 38,597,376, twelve blocks of 7,087,872 and ln_f of 1,536: N = 123,653,376.
    # 6 N = 741,920,256, and attention's 12 x 12 x 768 x 1024 = 113,246,208.
    assert flops_per_token(GPT2_SMALL, 1024) == 855_166_464
    assert flops_per_token(GPT2_SMALL, 512) == 855_166_464 - 56_623_104


def test_the_head_counts_once_and_tables_that_are_looked_up_never():
    longer = dataclasses.replace(GPT2_SMALL, n_positions=4096)
    untied = dataclasses.replace(GPT2_SMALL, tie_word_embeddings=False)
    padded = dataclasses.replace(GPT2_SMALL, pad_vocab_size_multiple=64)
    for config in (longer, untied, padded):
        assert flops_per_token(config, 1024) == flops_per_token(GPT2_SMALL, 1024)


@pytest.mark.parametrize(
    ("kind", "bfloat16", "float32"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA H200 NVL", 835e12, 60e12),
        ("NVIDIA GH200 480GB", 989e12, 67e12),
        ("NVIDIA B200", 2250e12, None),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 19.5e12),
        ("NVIDIA A10", 125e12, 31.2e12),
        ("NVIDIA A10G", 70e12, 35e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("Tesla V100-SXM2-32GB", None, 15.7e12),
        ("TPU v4", 275e12, None),
        ("TPU v5", 459e12, None),
        ("TPU v5 lite", 197e12, None),
    ],
)
def test_the_peak_is_that_of_the_longest_name_that_fits(kind, bfloat16, float32):
    assert peak_flops(kind, jnp.bfloat16) == peak_flops(kind, "bfloat16") == bfloat16
    assert peak_flops(kind, jnp.float32) == float32


@pytest.mark.parametrize(
    "kind",
    [
        "cpu",
        "",
        "NVIDIA",
        "NVIDIA A1000 Laptop GPU",
        "NVIDIA H20",
        "TPU v50",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    ],
)
def test_an_unknown_device_has_no_peak(kind):
    for dtype in ("bfloat16", "float32"):
        assert peak_flops(kind, dtype) is None
        assert mfu(1e6, GPT2_SMALL, 1024, kind, dtype, 1) is None


def test_other_dtypes_and_this_cpu_have_no_peak():
    assert peak_flops("NVIDIA H200", "float16") is None
    cpu = jax.devices("cpu")[0].device_kind
    assert mfu(1e3, GPT2_SMALL, 1024, cpu, "float32", 1) is None


def test_mfu_is_the_share_of_what_all_devices_can_do():
    # 400,000 x 855,166,464 = 3.42e14 operations per second, of 2 x 989e12.
    share = mfu(400_000, GPT2_SMALL, 1024, "NVIDIA H100 80GB HBM3", jnp.bfloat16, 2)
    assert share == pytest.approx(0.172935, abs=1e-6)
    # A device doing nothing but the model's operations, all the time, reaches one.
    fastest = 19.5e12 / flops_per_token(GPT2_SMALL, 256)
    assert mfu(fastest, GPT2_SMALL, 256, "NVIDIA A100-SXM4-40GB", "float32", 1) == pytest.approx(1)
