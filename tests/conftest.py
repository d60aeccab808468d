"""What the tests share: two small models, eight devices, and the rule that no shape broadcasts
by accident."""

import contextlib
import dataclasses
import http.server
import os
import tempfile
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings

from gpt2_jax.config import GPT2Config
from gpt2_jax.model import Params, param_shapes

jax.config.update("jax_num_cpu_devices", 8)
# What several tests compile is compiled once, in processes that tests start too.
_programs = tempfile.TemporaryDirectory(prefix="gpt2_jax-tests-")
for _name, _value in (
    ("jax_compilation_cache_dir", _programs.name),
    ("jax_persistent_cache_min_compile_time_secs", 0.1),
):
    jax.config.update(_name, _value)
    os.environ[_name.upper()] = str(_value)
jax.config.update("jax_numpy_rank_promotion", "raise")
# The same examples in every run, and no clock in the result.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def tiny_config() -> GPT2Config:
    return GPT2Config(
        vocab_size=97,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=4,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        eos_token_id=None,
    )


@pytest.fixture(scope="session")
def tiny_params(tiny_config: GPT2Config) -> Params:
    """Parameters as if trained: no bias is zero, no scale is one, attention is not uniform."""
    rng = np.random.default_rng(0)

    def draw(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(rng.normal(mean, 0.2, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, param_shapes(tiny_config))


@pytest.fixture(scope="session")
def shallow_config(tiny_config: GPT2Config) -> GPT2Config:
    """A single block, which compiles in half the time."""
    return dataclasses.replace(tiny_config, n_layer=1)


@pytest.fixture(scope="session")
def shallow_params(shallow_config: GPT2Config, tiny_params: Params) -> Params:
    return {name: tiny_params[name] for name in param_shapes(shallow_config)}


@pytest.fixture(scope="session")
def serve():
    """Starts an HTTP server on loopback: `with serve(Handler) as server`; it has a list `requests`
    for the handler to fill.
    """

    @contextlib.contextmanager
    def serving(handler):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.requests = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
        server.server_close()

    return serving
