"""Weights from directories and files: every layout loads, and every damage is told."""

import dataclasses
import json
import sys

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub.errors import HTTPError
from safetensors.numpy import save_file

from gpt2_jax.errors import UserError
from gpt2_jax.interop.huggingface import config_to_json, state_dict_from_params
from gpt2_jax.interop.pretrained import load_pretrained
from gpt2_jax.sources import load_source


@pytest.fixture(autouse=True)
def nothing_in_the_working_directory(tmp_path_factory, monkeypatch):
    """`data/gpt2_weights.pt` there would be taken for "gpt2"."""
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))


@pytest.fixture
def state(tiny_config, tiny_params):
    return state_dict_from_params(tiny_params, tiny_config)


@pytest.fixture
def directory(tmp_path, tiny_config, state):
    """A Hugging Face model directory of the tiny model."""
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(tiny_config)))
    save_file(state, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(directory, state):
    """The same in three shards and an index."""
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for index, name in enumerate(state):
        weight_map[name] = f"model-{index % 3:05d}-of-00003.safetensors"
    for shard in set(weight_map.values()):
        part = {name: state[name] for name in state if weight_map[name] == shard}
        save_file(part, directory / shard)
    write_index(directory, weight_map)
    return directory


def write_index(directory, weight_map):
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def assert_loads(source, config, params):
    loaded, loaded_config = load_pretrained(source)
    assert loaded_config == config
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_a_directory_with_one_file(directory, tiny_config, tiny_params):
    assert_loads(directory, tiny_config, tiny_params)
    assert_loads(str(directory), tiny_config, tiny_params)


def test_a_directory_with_shards(sharded, tiny_config, tiny_params):
    assert_loads(sharded, tiny_config, tiny_params)


def test_a_file_beside_its_config(directory, tiny_config, tiny_params):
    assert_loads(directory / "model.safetensors", tiny_config, tiny_params)


def test_a_file_with_its_config_given(directory, tiny_config, tiny_params):
    (directory / "config.json").unlink()
    loaded, config = load_pretrained(directory / "model.safetensors", config=tiny_config)
    assert config == tiny_config
    jax.tree.map(np.testing.assert_array_equal, loaded, tiny_params)


def test_a_file_of_no_published_size_needs_a_config(directory):
    (directory / "config.json").unlink()
    with pytest.raises(UserError, match=r"2 layers and wte\.weight \(97, 32\).*config\.json"):
        load_pretrained(directory / "model.safetensors")


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
def test_16_bit_weights_become_float32(directory, state, dtype):
    narrow = {name: array.astype(dtype) for name, array in state.items()}
    save_file(narrow, directory / "model.safetensors")
    params, _ = load_pretrained(directory)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    expected_VD = narrow["transformer.wte.weight"].astype(np.float32)
    np.testing.assert_array_equal(params["wte"]["embedding"], expected_VD)


def test_a_config_given_for_a_directory_must_be_its_own(directory, tiny_config):
    other = dataclasses.replace(tiny_config, n_layer=3)
    with pytest.raises(UserError, match=r"n_layer=2 .*, not of n_layer=3 "):
        load_pretrained(directory, config=other)
    params, config = load_pretrained(directory, config=dataclasses.replace(tiny_config))
    assert config == tiny_config
    assert set(params) == {"wte", "wpe", "h_0", "h_1", "ln_f"}


@pytest.mark.parametrize("bytes_kept", [0, 4, 100, -1])
def test_a_file_cut_short_is_refused(directory, bytes_kept):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:bytes_kept])
    with pytest.raises(UserError, match=r"model\.safetensors are damaged"):
        load_pretrained(directory)


@pytest.mark.parametrize(
    "shard", ["../evil.safetensors", "/etc/passwd", "sub/model.safetensors", "", ".", "..", 3, None]
)
def test_an_index_cannot_lead_out_of_its_directory(sharded, shard):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    write_index(sharded, index["weight_map"] | {"transformer.ln_f.bias": shard})
    with pytest.raises(UserError):
        load_pretrained(sharded)


def test_an_index_that_leads_elsewhere_is_refused_before_anything_is_read(sharded):
    for file in sharded.glob("*.safetensors"):
        file.unlink()
    write_index(sharded, {"transformer.ln_f.bias": "../evil.safetensors"})
    with pytest.raises(UserError, match=r"names '\.\./evil\.safetensors'.*refused"):
        load_pretrained(sharded)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": [1]}'])
def test_a_damaged_index_is_named(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"index .*index\.json is damaged"):
        load_pretrained(sharded)


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00001-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00001-of-00003\.safetensors"):
        load_pretrained(sharded)


def test_missing_parts_of_a_directory_are_named(directory):
    (directory / "config.json").rename(directory / "kept")
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        load_pretrained(directory)
    (directory / "kept").rename(directory / "config.json")
    (directory / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        load_pretrained(directory)


@pytest.mark.parametrize("text", ["", "{", "\xff", "[]", '{"n_layer": 2}'])
def test_a_damaged_config_is_named(directory, text):
    (directory / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json"):
        load_pretrained(directory)


def test_what_does_not_exist_is_refused_and_the_sizes_listed(directory):
    with pytest.raises(UserError, match=r"'gpt5'.*gpt2, gpt2-medium, gpt2-large, gpt2-xl"):
        load_pretrained("gpt5")
    with pytest.raises(UserError, match="revision='main' is for models from the hub"):
        load_pretrained(directory, revision="main")
    (directory / "weights.npz").write_bytes(b"")
    with pytest.raises(UserError, match=r"weights\.npz is no weight file"):
        load_pretrained(directory / "weights.npz")


def test_a_torch_file_without_torch_says_what_to_install(directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    for source in (directory, directory / "pytorch_model.bin"):
        with pytest.raises(UserError, match=r"pytorch_model\.bin needs PyTorch; pip install torch"):
            load_pretrained(source)


def test_a_download_that_breaks_off_says_what_to_do(monkeypatch):
    def break_off(*_, **__):
        raise HTTPError("peer closed connection without sending complete message body")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", break_off)
    with pytest.raises(UserError, match=r"peer closed connection .*give a local copy"):
        load_pretrained("gpt2")


def test_scripts_name_a_directory_as_their_source(directory, tiny_config, tiny_params):
    params, config = load_source(str(directory))
    assert config == tiny_config
    jax.tree.map(np.testing.assert_array_equal, params, tiny_params)
    _, config = load_source("pretrained", weights=str(directory))
    assert config == tiny_config


def test_sources_that_do_not_go_together_are_refused(directory):
    with pytest.raises(UserError, match="is no directory"):
        load_source(str(directory / "nowhere"))
    with pytest.raises(UserError, match="--model gpt2 goes with --source pretrained"):
        load_source(str(directory), model="gpt2")
    with pytest.raises(UserError, match="'gpt9'"):
        load_source("pretrained", model="gpt9")
    with pytest.raises(UserError, match=r"n_layer=2 .*, not of n_layer=12 "):
        load_source("pretrained", model="gpt2", weights=str(directory))
