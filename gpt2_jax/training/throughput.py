"""How much of a device's arithmetic training puts to use: model FLOPs utilization, MFU.

Chowdhery et al., 2022, "PaLM: Scaling Language Modeling with Pathways", appendix B: the
operations that forward and backward pass of the model need, whatever else is computed, as a
share of the most the device can do.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from gpt2_jax.config import GPT2Config
from gpt2_jax.lora_settings import LoraSettings, adapter_parameter_count


def flops_per_token(
    config: GPT2Config, sequence_length: int, lora: LoraSettings | None = None
) -> float:
    """Operations that training on one token needs: 6 N + 12 L D T.

    Each of N weights is multiplied and added once forward and twice backward: 6 operations, or 4
    for a frozen one beside an adapter, whose own few take 6.
    Attention adds two products of T x D a layer, not halved for the causal mask. N counts the
    weights that are multiplied, with norms and biases as PaLM does: no table that is only looked
    up, so wte counts where it is the head, and then once.
    """
    each = 6.0 if lora is None else 4.0
    lookup_rows = config.n_positions
    if not config.tie_word_embeddings:
        lookup_rows += config.vocab_size
    multiplied = config.parameter_count - lookup_rows * config.n_embd
    adapter = 0 if lora is None else adapter_parameter_count(config, lora)
    attention = 12.0 * config.n_layer * config.n_embd * sequence_length
    return each * multiplied + 6.0 * adapter + attention


def peak_flops(device_kind: str, dtype: DTypeLike) -> float | None:
    """The most operations per second that one device can do in matrix products.

    Args:
      device_kind: as `jax.devices()[0].device_kind` has it.
      dtype: bfloat16 (accumulated in float32), or float32 proper, without TensorFloat-32.

    Returns:
      The vendor's figure without sparsity, or None if this device has none for this dtype.
    """
    if " MIG " in device_kind:
        return None  # a slice of a device, which still bears the name of the whole
    names = [name for name in _PEAKS if _starts_with(device_kind, name)]
    if not names:
        return None
    teraflops: float | None = getattr(_PEAKS[max(names, key=len)], jnp.dtype(dtype).name, None)
    return None if teraflops is None else teraflops * 1e12


def mfu(
    tokens_per_second: float,
    config: GPT2Config,
    sequence_length: int,
    device_kind: str,
    dtype: DTypeLike,
    devices: int,
    lora: LoraSettings | None = None,
) -> float | None:
    """Model FLOPs utilization, from 0 to 1; None if the device's peak is not known.

    Args:
      tokens_per_second: tokens trained on, by all devices together.
      config: the model.
      sequence_length: T, tokens in one training window.
      device_kind: as for `peak_flops`.
      dtype: the compute dtype.
      devices: number of devices, all of this kind.
      lora: the adapter, if that is all that is trained.
    """
    peak = peak_flops(device_kind, dtype)
    if peak is None:
        return None
    flops = tokens_per_second * flops_per_token(config, sequence_length, lora)
    return flops / (peak * devices)


def _starts_with(device_kind: str, name: str) -> bool:
    """Whether the first words are the name: an A100 is no A10."""
    return device_kind.startswith(name) and not device_kind[len(name) :][:1].isalnum()


class _Peak(NamedTuple):
    """Dense matrix products, 10^12 operations per second; None where there is no such figure."""

    bfloat16: float | None
    float32: float | None


# By the longest name that fits. Data sheets often give the sparse figure: here, half of it.
_PEAKS = {
    # Blackwell: HGX B200 and GB200 data sheets; their float32 differs between editions.
    "NVIDIA B200": _Peak(2250, None),
    "NVIDIA GB200": _Peak(2500, None),
    # Hopper: H100, H200 and GH200 data sheets.
    "NVIDIA H100 80GB HBM3": _Peak(989, 67),
    "NVIDIA H100 PCIe": _Peak(756, 51),
    "NVIDIA H100 NVL": _Peak(835, 60),
    "NVIDIA H200": _Peak(989, 67),
    "NVIDIA H200 NVL": _Peak(835, 60),
    "NVIDIA GH200": _Peak(989, 67),
    # Ada: L4, L40 and L40S data sheets; for RTX, appendix A of the Ada GPU white paper.
    "NVIDIA L4": _Peak(121, 30.3),
    "NVIDIA L40": _Peak(181, 90.5),
    "NVIDIA L40S": _Peak(362, 91.6),
    "NVIDIA RTX 6000 Ada Generation": _Peak(364.2, 91.1),
    "NVIDIA GeForce RTX 4090": _Peak(165.2, 82.6),
    # Ampere: A100, A10, A10G (Amazon's own A10), A30 and A40 data sheets; for RTX, the
    # appendices of the GA102 white paper.
    "NVIDIA A100": _Peak(312, 19.5),
    "NVIDIA A10": _Peak(125, 31.2),
    "NVIDIA A10G": _Peak(70, 35),
    "NVIDIA A30": _Peak(165, 10.3),
    "NVIDIA A40": _Peak(149.7, 37.4),
    "NVIDIA RTX A6000": _Peak(154.8, 38.7),
    "NVIDIA GeForce RTX 3090": _Peak(71, 35.6),
    # RTX Blackwell GPU white paper, appendix A.
    "NVIDIA GeForce RTX 5090": _Peak(209.5, 104.8),
    # Volta and Turing have no bfloat16: V100, V100S and T4 data sheets.
    "Tesla V100-SXM2": _Peak(None, 15.7),
    "Tesla V100-PCIE": _Peak(None, 14.0),
    "Tesla V100S-PCIE": _Peak(None, 16.4),
    "Tesla T4": _Peak(None, 8.1),
    # cloud.google.com/tpu/docs, per chip; a device of v2 and v3 is one of a chip's two cores.
    # The names are those of JAX's own table, jax/_src/pallas/mosaic/tpu_info.py.
    "TPU v2": _Peak(22.5, None),
    "TPU v3": _Peak(61.5, None),
    "TPU v4": _Peak(275, None),
    "TPU v5 lite": _Peak(197, None),
    "TPU v5e": _Peak(197, None),
    "TPU v5": _Peak(459, None),
    "TPU v5p": _Peak(459, None),
    "TPU v6 lite": _Peak(918, None),
    "TPU v6e": _Peak(918, None),
}
