"""Figures that others published: small trained fixtures, and OpenAI's own weights."""

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax import tokenizer
from gpt2_jax.generation.decode import generate
from gpt2_jax.model import GPT2
from parity.checks import check_greedy, check_logits, check_state_dict, jax_logits
from parity.models import Models, pretrained_models
from parity.outcomes import Prove, bounded

# Every published activation of nano-sort by its name there; block 0 unless it says otherwise.
ACTIVATIONS = {
    "tok_emb": "wte",
    "pos_emb": "wpe",
    "x": "drop/__call__",
    "ln1": "h_0/ln_1/__call__",
    "qkv": "h_0/attn/c_attn/__call__",
    "q": "h_0/attn/q",
    "k": "h_0/attn/k",
    "v": "h_0/attn/v",
    "att": "h_0/attn/scores",
    "attSm": "h_0/attn/probabilities",
    "y": "h_0/attn/mixed",
    "yProj": "h_0/attn/c_proj/__call__",
    "attnResid": "h_0/middle",
    "ln2": "h_0/ln_2/__call__",
    "fc": "h_0/mlp/c_fc/__call__",
    "gelu": "h_0/mlp/activation",
    "mlp": "h_0/mlp/c_proj/__call__",
    "mlpResid": "h_0/__call__/0",
    "block0": "h_0/__call__/0",
    "block1": "h_1/__call__/0",
    "block2": "h_2/__call__/0",
    "ln_f": "ln_f/__call__",
    "lm_head": "__call__",
    "probs": "probabilities",
}


@pytest.fixture(scope="module")
def nano_sort(shared: Path) -> Models:
    return pretrained_models(shared / "fixtures/nano-sort")


@pytest.fixture(scope="module")
def published(shared: Path) -> dict[str, np.ndarray]:
    with np.load(shared / "fixtures/nano-sort/activations.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def computed(nano_sort: Models, published: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All that the JAX model computes on the published input, by path."""
    tokens_BT = jnp.asarray(published["idx"], jnp.int32)
    # The plain form of attention alone has scores and probabilities to show.
    _, kept = GPT2(nano_sort.config, implementation="plain").apply(
        {"params": nano_sort.params},
        tokens_BT,
        capture_intermediates=True,
        mutable=["intermediates"],
    )
    values = {
        # A value is kept as a tuple with one entry a call; every module here is called once.
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/0"): np.asarray(value)
        for path, value in jax.tree_util.tree_leaves_with_path(kept["intermediates"])
    }
    params = nano_sort.params
    values["wte"] = np.asarray(params["wte"]["embedding"])[published["idx"].astype(int)]
    values["wpe"] = np.asarray(params["wpe"]["embedding"])[None]
    values["probabilities"] = np.asarray(jax.nn.softmax(values["__call__"], axis=-1))
    return values


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nano_sort_activation(
    published: dict[str, np.ndarray], computed: dict[str, np.ndarray], name: str
) -> None:
    # Sums of up to 192 float32 products of order 1.
    np.testing.assert_allclose(computed[ACTIVATIONS[name]], published[name], rtol=1e-6, atol=2e-6)


def test_no_published_activation_is_left_out(published: dict[str, np.ndarray]) -> None:
    assert set(ACTIVATIONS) == set(published) - {"idx"}


def test_nano_sort_logits(
    nano_sort: Models, published: dict[str, np.ndarray], prove: Prove
) -> None:
    logits_BTV = jax_logits(nano_sort, published["idx"].astype(np.int64))
    prove(bounded("nano-sort's published logits", published["lm_head"], logits_BTV, 2e-6))


def test_nano_sort_agrees_with_both_pytorch_models(
    nano_sort: Models, published: dict[str, np.ndarray], prove: Prove
) -> None:
    prove(check_state_dict(nano_sort))
    prove(*check_logits(nano_sort, published["idx"].astype(np.int64), bound=2e-6))


def test_nano_sort_sorts(nano_sort: Models) -> None:
    prompts = [list(symbols) for symbols in itertools.product(range(3), repeat=6)]
    sorted_by_model = generate(nano_sort.params, nano_sort.config, prompts, max_new_tokens=6)
    right = sum(out == sorted(prompt) for prompt, out in zip(prompts, sorted_by_model, strict=True))
    print(f"nano-sort: {right} of {len(prompts)} sequences sorted")
    assert right == len(prompts)


def test_tiny_random_gpt2(shared: Path, prove: Prove) -> None:
    folder = shared / "fixtures/tiny-random-gpt2"
    models = pretrained_models(folder)
    prove(check_state_dict(models))
    cases = json.loads((folder / "greedy.json").read_text())["cases"]
    for case in cases:
        prompt, expected = case["prompt_ids"], case["new_ids"]
        [new] = generate(models.params, models.config, [prompt], max_new_tokens=len(expected))
        assert new == expected
        prove(*check_logits(models, np.array([prompt + expected]), bound=2e-6))


class TestRealWeights:
    """OpenAI's 124M weights against what others published of them."""

    @pytest.fixture(scope="class")
    def facts(self, shared: Path) -> dict:
        return json.loads((shared / "fixtures/gpt2-124m-facts.json").read_text())

    def test_three_implementations_agree(self, real_gpt2: Models, prove: Prove) -> None:
        tokens = tokenizer.encode("The quick brown fox jumps over the lazy dog").tolist()
        prompt = tokenizer.encode("Hello, my name is").tolist()
        prove(check_state_dict(real_gpt2), *check_logits(real_gpt2, np.array([tokens])))
        prove(check_greedy(real_gpt2, prompt, 50))

    def test_last_position_logits(self, real_gpt2: Models, facts: dict) -> None:
        for case in facts["last_position_logits"]["cases"]:
            logits_V = jax_logits(real_gpt2, np.array([case["ids"]]))[0, -1]
            assert np.argsort(-logits_V)[:10].tolist() == case["top10_ids"]
            # Published with four decimals, computed by another runtime.
            np.testing.assert_allclose(
                logits_V[case["top10_ids"]], case["top10_logits"], rtol=0, atol=2e-3
            )
            np.testing.assert_allclose(logits_V[:5], case["logits_first5"], rtol=0, atol=2e-3)

    def test_greedy_texts(self, real_gpt2: Models, facts: dict) -> None:
        def continuation(prompt: list[int], count: int) -> list[int]:
            return generate(real_gpt2.params, real_gpt2.config, [prompt], max_new_tokens=count)[0]

        ids, _, _, pico = facts["greedy"]
        prompt, expected = ids["prompt_ids"], ids["output_ids"]
        assert prompt + continuation(prompt, len(expected) - len(prompt)) == expected
        new = continuation(pico["prompt_ids"], pico["n_new"])
        assert tokenizer.decode(new) == pico["continuation"]
        for case in facts["greedy"][1:3]:
            for text, whole in zip(case["prompts"], case["outputs"], strict=True):
                prompt = tokenizer.encode(text).tolist()
                # Their max_length of 20 counts the prompt, and padding of shorter prompts.
                new = continuation(prompt, 20 - len(prompt))
                assert (text + tokenizer.decode(new)).startswith(whole)
