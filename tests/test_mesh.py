"""How a run lies on its devices: any arrangement holds the same arrays, and says why it cannot."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from gpt2_jax.config import GPT2Config
from gpt2_jax.data.batches import Windows, training_batches
from gpt2_jax.errors import UserError
from gpt2_jax.model import param_shapes
from gpt2_jax.training.mesh import Layout, make_layout, make_mesh, partition
from gpt2_jax.training.optimizer import learning_rate_schedule, make_optimizer
from gpt2_jax.training.settings import (
    DataSettings,
    MeshSettings,
    OptimizerSettings,
    TrainSettings,
)

# data, fsdp, tensor of eight devices, and of fewer.
MESHES = [(1, 1, 1), (8, 1, 1), (4, 2, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4), (1, 1, 8), (3, 1, 1)]


def mesh(*sizes):
    return make_mesh(MeshSettings(*sizes))


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((-1, 1, 1), (8, 1, 1)),
        ((-1, 2, 1), (4, 2, 1)),
        ((1, -1, 2), (1, 4, 2)),
        ((2, 2, -1), (2, 2, 2)),
        ((8, 1, -1), (8, 1, 1)),
        ((2, 2, 2), (2, 2, 2)),
    ],
)
def test_minus_one_takes_the_devices_that_are_left(sizes, shape):
    made = mesh(*sizes)
    assert made.axis_names == ("data", "fsdp", "tensor")
    assert made.devices.shape == shape
    assert set(made.devices.flat) == set(jax.devices())


def test_without_settings_all_devices_split_the_batch():
    assert make_mesh(MeshSettings()).devices.shape == (8, 1, 1)


def test_a_smaller_mesh_uses_the_first_devices():
    assert list(mesh(1, 1, 1).devices.flat) == jax.devices()[:1]
    assert list(mesh(1, 3, 1).devices.flat) == jax.devices()[:3]


@pytest.mark.parametrize(
    "sizes", [(16, 1, 1), (3, 3, 1), (-1, 3, 1), (-1, 16, 1), (1, -1, 5), (9, 1, -1)]
)
def test_a_mesh_that_does_not_fit_is_refused_with_its_sizes(sizes):
    data, fsdp, tensor = sizes
    with pytest.raises(UserError) as caught:
        mesh(*sizes)
    assert f"data {data} x fsdp {fsdp} x tensor {tensor} does not fit 8 device(s)" in str(
        caught.value
    )


def test_several_processes_must_use_all_devices(monkeypatch):
    """Or one of them would have no device of the mesh and nothing to do."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="does not fit 8 device"):
        mesh(4, 1, 1)
    assert mesh(-1, 1, 1).size == 8


def specs(config, sizes):
    """The rule's answer for every parameter, by its name."""
    made, shapes = mesh(*sizes), param_shapes(config)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): partition(path, leaf.shape, made)
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }


# D = 32, F = 128, T = 64: all distinct, so that the largest dimension is never in doubt.
CONFIG = GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=1, n_head=4)
UNTIED = dataclasses.replace(CONFIG, tie_word_embeddings=False)
KERNELS = {  # (tensor only, fsdp only, both)
    "h_0/attn/c_attn/kernel": ((None, "tensor"), (None, "fsdp"), ("fsdp", "tensor")),
    "h_0/attn/c_proj/kernel": (("tensor", None), ("fsdp", None), ("tensor", "fsdp")),
    "h_0/mlp/c_fc/kernel": ((None, "tensor"), (None, "fsdp"), ("fsdp", "tensor")),
    "h_0/mlp/c_proj/kernel": (("tensor", None), ("fsdp", None), ("tensor", "fsdp")),
    "wte/embedding": (("tensor", None), ("fsdp", None), ("tensor", "fsdp")),
    "lm_head/embedding": (("tensor", None), ("fsdp", None), ("tensor", "fsdp")),
    "wpe/embedding": ((None, None), ("fsdp", None), ("fsdp", None)),
}


def whole(spec):
    return all(axis is None for axis in spec)


@pytest.mark.parametrize(("column", "sizes"), [(0, (1, 1, 2)), (1, (1, 2, 1)), (2, (2, 2, 2))])
def test_matrices_are_split_and_vectors_stay_whole(column, sizes):
    found = specs(UNTIED, sizes)
    assert {name: found[name] for name in KERNELS} == {
        name: PartitionSpec(*wanted[column]) for name, wanted in KERNELS.items()
    }
    vectors = found.keys() - KERNELS.keys()
    assert {name.rpartition("/")[2] for name in vectors} == {"bias", "scale"}
    assert all(whole(found[name]) for name in vectors)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (8, 1, 1)])
def test_without_fsdp_and_tensor_every_device_has_all_parameters(sizes):
    assert all(whole(spec) for spec in specs(CONFIG, sizes).values())


def test_dimensions_that_do_not_divide_stay_whole():
    """GPT-2's own vocabulary is odd, 50,257; its parts on two devices would differ in size."""
    odd = dataclasses.replace(CONFIG, vocab_size=97)
    assert "tensor" not in specs(odd, (1, 1, 2))["wte/embedding"]
    three = specs(CONFIG, (1, 3, 1))  # of 32, 64, 96 and 128 only 96 is a multiple of 3
    assert {name for name, spec in three.items() if not whole(spec)} == {
        "h_0/attn/c_attn/kernel",
        "wte/embedding",
    }
    # Still arrays like any other: every device holds them as the rule says.
    for config, sizes in [(odd, (1, 2, 2)), (CONFIG, (1, 3, 1))]:
        layout = Layout(mesh(*sizes), rows=1, passes=1)
        host = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), param_shapes(config))
        jax.tree.map(np.testing.assert_array_equal, layout.place(host), host)


def test_an_odd_vocabulary_is_shared_out_by_its_width():
    """wte is the largest table: whole on each of eight devices it would cost XL 1 GB on each."""
    odd = dataclasses.replace(CONFIG, vocab_size=97)
    assert specs(odd, (1, 8, 1))["wte/embedding"] == PartitionSpec(None, "fsdp")


def test_moments_lie_as_the_parameters_they_belong_to():
    settings = OptimizerSettings()
    optimizer = make_optimizer(settings, learning_rate_schedule(settings, 3))
    layout = Layout(mesh(2, 2, 2), rows=4, passes=1)
    params = layout.shard(param_shapes(CONFIG))
    opt_state = layout.shard(jax.eval_shape(optimizer.init, param_shapes(CONFIG)))
    mirrors = [
        moments
        for moments in jax.tree.leaves(
            opt_state, is_leaf=lambda node: isinstance(node, dict) and "wte" in node
        )
        if isinstance(moments, dict)
    ]
    assert len(mirrors) == 2  # running mean and squared mean
    assert all(moments == params for moments in mirrors)


def test_each_device_holds_its_share_alone():
    """What fsdp is for: of a matrix of 32 x 128 float32 on 2 x 2 x 2 devices each has a quarter."""
    layout = Layout(mesh(2, 2, 2), rows=4, passes=1)
    placed = layout.place({"c_fc": {"kernel": np.ones((32, 128), np.float32)}})
    shards = placed["c_fc"]["kernel"].addressable_shards
    assert len(shards) == 8
    assert {shard.data.shape for shard in shards} == {(16, 64)}


@pytest.mark.parametrize("sizes", MESHES)
def test_what_is_placed_is_the_same_on_every_mesh(sizes, tiny_params):
    layout = Layout(mesh(*sizes), rows=1, passes=1)
    host = jax.device_get({**tiny_params, "count": np.asarray(17, np.int32)})
    placed = layout.place(host)
    assert jax.tree.structure(placed) == jax.tree.structure(host)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), placed, host)
    assert jax.tree.map(lambda leaf: leaf.sharding, placed) == layout.shard(placed)


def test_placing_takes_arrays_of_the_device_too(tiny_params):
    layout = Layout(mesh(1, 4, 2), rows=1, passes=1)
    moved = layout.place(layout.place(tiny_params))
    jax.tree.map(np.testing.assert_array_equal, moved, tiny_params)


def settings(batch_size, micro_batch_size, sizes):
    return TrainSettings(
        run_dir="runs/test",
        steps=3,
        data=DataSettings(
            sequence_length=6, batch_size=batch_size, micro_batch_size=micro_batch_size
        ),
        mesh=MeshSettings(*sizes),
    )


@pytest.mark.parametrize("sizes", [sizes for sizes in MESHES if sizes[0] != 3])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_a_batch_is_the_same_on_every_mesh(sizes, micro_batch_size):
    windows = Windows([np.arange(1000, dtype=np.uint16)], 6)
    batches = training_batches(windows, 16, seed=5)
    layout = make_layout(settings(16, micro_batch_size, sizes))
    tokens_PRT = layout.load_batch(batches, 3)
    assert tokens_PRT.shape == (layout.passes, layout.rows, 7)
    assert tokens_PRT.dtype == jnp.int32
    assert tokens_PRT.sharding == layout.batch
    np.testing.assert_array_equal(np.asarray(tokens_PRT).reshape(16, 7), batches(3))
    # No device holds more than one pass takes of it.
    rows = {shard.data.shape for shard in tokens_PRT.addressable_shards}
    assert rows == {(layout.passes, micro_batch_size, 7)}


def test_a_batch_is_read_once():
    asked = []

    def batches(step, rows):
        asked.append((step, list(rows)))
        return np.zeros((len(rows), 7), np.int32)

    make_layout(settings(16, 1, (4, 2, 1))).load_batch(batches, 11)
    assert asked == [(11, list(range(16)))]


@pytest.mark.parametrize("sizes", MESHES[:-1])
def test_rows_are_split_over_the_batch_axes(sizes):
    layout = Layout(mesh(*sizes), rows=8, passes=1)
    for array in (np.arange(48, dtype=np.int32).reshape(16, 3), np.arange(8) < 5):
        put = layout.put_rows(array)
        np.testing.assert_array_equal(np.asarray(put), array, strict=True)
        ranks = sizes[0] * sizes[1]
        assert {len(shard.data) for shard in put.addressable_shards} == {len(array) // ranks}


@pytest.mark.parametrize(
    ("batch", "micro", "sizes", "rows", "passes"),
    [
        (512, 64, (-1, 1, 1), 512, 1),
        (512, 8, (-1, 1, 1), 64, 8),
        (512, 64, (2, 2, 2), 256, 2),
        (512, 64, (1, 1, 8), 64, 8),
        (12, 2, (3, 1, 1), 6, 2),
        (1, 1, (1, 1, 8), 1, 1),
    ],
)
def test_passes_follow_from_batch_and_devices(batch, micro, sizes, rows, passes):
    """512 = 64 x 4 devices that split the batch x 2 passes; those of `tensor` do not split it."""
    layout = make_layout(settings(batch, micro, sizes))
    assert (layout.rows, layout.passes) == (rows, passes)


@pytest.mark.parametrize(
    ("batch", "micro", "sizes", "arithmetic", "remedy"),
    [
        (512, 128, (8, 1, 1), "128 x 8 = 1024", "a --data.micro_batch_size of 64 or a divisor"),
        (512, 512, (2, 2, 2), "512 x 4 = 2048", "a --data.micro_batch_size of 128 or a divisor"),
        (4, 2, (8, 1, 1), "2 x 8 = 16", "make --data.batch_size a multiple of 8"),
        (12, 1, (8, 1, 1), "1 x 8 = 8", "make --data.batch_size a multiple of 8"),
        (512, 64, (3, 1, 1), "64 x 3 = 192", "make --data.batch_size a multiple of 3"),
        (48, 4, (2, 4, 1), "4 x 8 = 32", "a --data.micro_batch_size of 6 or a divisor"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_the_arithmetic(
    batch, micro, sizes, arithmetic, remedy
):
    with pytest.raises(UserError) as caught:
        make_layout(settings(batch, micro, sizes))
    message = str(caught.value)
    assert f"data.batch_size={batch} is not" in message
    assert arithmetic in message
    assert remedy in message


def test_the_remedy_helps():
    """48 sequences on eight devices: 6 a device at a time, or its divisors 3, 2 and 1."""
    for micro in (6, 3, 2, 1):
        assert make_layout(settings(48, micro, (8, 1, 1))).passes == 6 // micro
