"""Adapters between JAX and PEFT: either reads what the other wrote, and computes the same.

Logits are compared with the adapter beside the layers and merged into them, on both sides.
"""

import copy
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from gpt2_jax.interop.peft import load_adapter, save_adapter
from gpt2_jax.lora import Lora, adapt, lora_shapes, merge
from gpt2_jax.lora_settings import TARGETS, LoraSettings
from gpt2_jax.model import GPT2, apply
from parity.checks import LOGITS_BOUND
from parity.models import Models, random_tokens
from parity.outcomes import Check, Prove, bounded

peft = pytest.importorskip("peft")

# PEFT 0.21 asks transformers 5 for a property by its old name.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

TO_PEFT, FROM_PEFT = "LoRA JAX -> PEFT", "LoRA PEFT -> JAX"
FILE = "adapter_model.safetensors"
SUBSETS = [
    targets
    for count in range(1, len(TARGETS) + 1)
    for targets in itertools.combinations(TARGETS, count)
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """PyTorch's threads spin while they wait for JAX's, longer than a small model takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_lora(models: Models, settings: LoraSettings) -> Lora:
    """Neither matrix is zero, and their scaled product about as large as a layer's weights."""
    rng = np.random.default_rng(4)
    deviation = 0.45 * models.config.initializer_range**0.5
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, deviation, leaf.shape), jnp.float32),
        lora_shapes(models.config, settings),
    )


def new_peft(models: Models, **fields: Any) -> Any:
    """A model with a fresh adapter of PEFT's, but for B, which is not zero."""
    torch.manual_seed(5)
    fields = {"task_type": "CAUSAL_LM", "fan_in_fan_out": True, **fields}
    model = peft.get_peft_model(copy.deepcopy(models.huggingface), peft.LoraConfig(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    return model.eval()


def open_in_peft(models: Models, directory: Path) -> Any:
    return peft.PeftModel.from_pretrained(copy.deepcopy(models.huggingface), directory).eval()


def check_logits(
    way: str, models: Models, theirs: Any, lora: Lora, settings: LoraSettings
) -> list[Check]:
    """An adapter here against PEFT's model, which gets merged; it must have changed something.

    JAX runs op by op: each set of targets would be a program of its own, slow to compile.
    """
    forward = functools.partial(apply, GPT2(models.config))
    tokens_BT = random_tokens(models.config, (2, 16))
    ours = {
        "beside": forward(adapt(models.params, lora, settings), tokens_BT),
        "merged": forward(merge(models.params, lora, settings), tokens_BT),
    }
    expected = {"beside": torch_logits(theirs, tokens_BT)}
    expected["merged"] = torch_logits(theirs.merge_and_unload(), tokens_BT)
    plain = torch_logits(models.huggingface, tokens_BT)
    assert np.abs(plain - expected["beside"]).max() > 0.1
    return [
        bounded(f"{way}: logits, adapter {how}", expected[how], ours[how], LOGITS_BOUND)
        for how in ours
    ]


def torch_logits(model: torch.nn.Module, tokens_BT: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens_BT)).logits.numpy()


def check_tensors(way: str, first: Path, second: Path) -> Check:
    """Two directories of an adapter hold the same tensors under the same names, bit for bit."""
    expected, found = load_file(first / FILE), load_file(second / FILE)
    different = [
        f"{name} differs"
        for name in sorted(expected.keys() | found.keys())
        if not (
            name in expected
            and name in found
            and expected[name].dtype == found[name].dtype
            and np.array_equal(expected[name], found[name])
        )
    ]
    return Check(
        f"{way}: tensors",
        len(different),
        0,
        (len(expected),),
        counted=f"{len(expected) - len(different)} of {len(expected)} tensors equal",
        details=tuple(different),
    )


OURS = {
    **{", ".join(targets): LoraSettings(targets, rank=4, alpha=6.0) for targets in SUBSETS},
    "rs_lora": LoraSettings(TARGETS, rank=4, alpha=6.0, rs_lora=True),
    "one block's layers": LoraSettings(("h_1.mlp.c_fc", "h_2.attn.c_attn"), rank=4, alpha=0.7),
    "patterns": LoraSettings(
        TARGETS,
        rank=4,
        alpha=6.0,
        rs_lora=True,
        rank_pattern=(("h_1.mlp.c_fc", 7), ("attn.c_attn", 2), ("h_1.attn.c_attn", 3)),
        alpha_pattern=(("h_2.mlp.c_proj", 9.0), ("c_proj", 2.5), ("h_0.attn.c_attn", 1.0)),
    ),
}


@pytest.mark.parametrize("case", OURS)
def test_peft_computes_what_an_adapter_from_here_does(
    small: Models, tmp_path: Path, prove: Prove, case: str
) -> None:
    settings = OURS[case]
    lora = random_lora(small, settings)
    save_adapter(tmp_path / "out", lora, settings, small.config)
    theirs = open_in_peft(small, tmp_path / "out")
    theirs.save_pretrained(tmp_path / "back")
    _, named = load_adapter(tmp_path / "out", small.config)
    assert load_adapter(tmp_path / "back", small.config)[1] == named
    prove(
        check_tensors(f"{TO_PEFT} -> JAX", tmp_path / "out", tmp_path / "back"),
        *check_logits(TO_PEFT, small, theirs, lora, settings),
    )


THEIRS: dict[str, dict[str, Any]] = {
    **{", ".join(targets): {"target_modules": list(targets)} for targets in SUBSETS},
    "default target": {},
    "all-linear": {"target_modules": "all-linear"},
    "expression": {"target_modules": r".*\.(0|2)\.(attn\.c_attn|mlp\.c_.*)"},
    "rs_lora, dropout": {
        "target_modules": ["c_proj"],
        "use_rslora": True,
        "lora_dropout": 0.3,
    },
    # Keys in the order of the alphabet: PEFT sorts them in the file, whatever they were in memory.
    "patterns": {
        "target_modules": list(TARGETS),
        "rank_pattern": {"attn.c_attn": 3, r"h\.1\..*": 5, "mlp.c_proj": 2},
        "alpha_pattern": {r"^transformer\.h\.0\.mlp\.c_fc": 1.5, "c_proj": 10, "mlp.c_fc": 7},
    },
    "exclude_modules, names": {
        "target_modules": ["c_proj"],
        "exclude_modules": ["h.1.attn.c_proj"],
    },
    "exclude_modules, expression": {
        "target_modules": ["c_proj", "c_attn"],
        "exclude_modules": r".*\.2\.attn.*",
    },
    "layers_to_transform": {"target_modules": ["c_attn", "c_fc"], "layers_to_transform": [0, 2]},
    "layers_pattern": {
        "target_modules": ["c_proj"],
        "layers_to_transform": 1,
        "layers_pattern": "h",
    },
}


@pytest.mark.parametrize("case", THEIRS)
def test_an_adapter_of_peft_computes_here_what_it_does_there(
    small: Models, tmp_path: Path, prove: Prove, case: str
) -> None:
    theirs = new_peft(small, r=4, lora_alpha=6, **THEIRS[case])
    theirs.save_pretrained(tmp_path / "theirs")
    lora, settings = load_adapter(tmp_path / "theirs", small.config)
    save_adapter(tmp_path / "ours", lora, settings, small.config)
    prove(
        check_tensors(f"{FROM_PEFT} -> PEFT", tmp_path / "theirs", tmp_path / "ours"),
        *check_logits(FROM_PEFT, small, theirs, lora, settings),
    )
    back = open_in_peft(small, tmp_path / "ours")
    prove(*check_logits(f"{FROM_PEFT} -> PEFT", small, back, lora, settings))


def test_the_124m_shape_either_way(gpt2_124m: Models, tmp_path: Path, prove: Prove) -> None:
    settings = LoraSettings(TARGETS, rank=8, alpha=16.0)
    lora = random_lora(gpt2_124m, settings)
    save_adapter(tmp_path / "ours", lora, settings, gpt2_124m.config)
    theirs = open_in_peft(gpt2_124m, tmp_path / "ours")
    prove(*check_logits(f"124M, {TO_PEFT}", gpt2_124m, theirs, lora, settings))

    theirs = new_peft(gpt2_124m, r=8, lora_alpha=16, target_modules=list(TARGETS))
    theirs.save_pretrained(tmp_path / "theirs")
    lora, its_settings = load_adapter(tmp_path / "theirs", gpt2_124m.config)
    assert its_settings == settings
    prove(*check_logits(f"124M, {FROM_PEFT}", gpt2_124m, theirs, lora, settings))
