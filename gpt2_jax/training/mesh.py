"""How a run lies on its devices: the mesh, the sharding rule, and the way of a batch onto it.

    data     groups that split each batch; every group holds all parameters between its devices
    fsdp     splits the batch too, and shares out parameters and optimizer state (ZeRO-3)
    tensor   splits the width of every layer; its devices work on the same sequences

One device is the mesh 1 x 1 x 1, many hosts are a larger one: there is no other code path.
The compiler puts in the communication (GSPMD, Xu et al., 2021).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gpt2_jax.errors import UserError
from gpt2_jax.model import AdaptedParams, Params
from gpt2_jax.training.settings import MeshSettings, TrainSettings

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# The dimension of each kernel and table that `tensor` splits: the columns of q, k and v, the MLP's
# columns, the vocabulary.
_TENSOR_DIMENSION = {"c_attn": 1, "c_fc": 1, "c_proj": 0, "wte": 0, "lm_head": 0}

# Tokens whose logits are held at a time. Each chunk adds to the table's gradient, 154 MB in 124M: a
# CPU's matrix products take so long that it does not matter, and what is smaller it reads faster.
_LOSS_CHUNK = {"cpu": 1024, "gpu": 16_384}


def make_mesh(settings: MeshSettings) -> Mesh:
    """Arranges the devices of all processes.

    A smaller mesh than there are devices uses the first ones, in a single process.

    Raises:
      UserError: if the devices cannot be arranged like that.
    """
    devices = jax.devices()
    sizes = dict(dataclasses.asdict(settings))
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values() and len(devices) % fixed == 0:
        sizes = {axis: len(devices) // fixed if n == -1 else n for axis, n in sizes.items()}
    shape = tuple(sizes[axis] for axis in AXES)
    count = math.prod(shape)
    if min(shape) < 1 or count > len(devices) or (count < len(devices) and jax.process_count() > 1):
        asked = " x ".join(f"{axis} {n}" for axis, n in sizes.items())
        raise UserError(
            f"the mesh {asked} does not fit {len(devices)} device(s); choose --mesh.data, "
            f"--mesh.fsdp and --mesh.tensor whose product is {len(devices)}, or -1 to fill one"
        )
    return jax.make_mesh(
        shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:count]
    )


def partition(path: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The sharding rule, for parameters and for the optimizer's moments, which mirror them.

    `tensor` splits the dimension that the columns of q, k and v, of the MLP, or the vocabulary lie
    in; `fsdp` the largest one left that divides. Vectors, adapters, and what does not divide, stay
    whole.
    """
    spec: list[str | None] = [None] * len(shape)
    names = [str(getattr(entry, "key", "")) for entry in path]
    if len(shape) < 2 or names[-1].startswith("lora_"):
        return PartitionSpec()
    split = next((_TENSOR_DIMENSION[name] for name in names if name in _TENSOR_DIMENSION), None)
    if split is not None and mesh.shape["tensor"] > 1 and shape[split] % mesh.shape["tensor"] == 0:
        spec[split] = "tensor"
    fsdp = mesh.shape["fsdp"]
    free = [dim for dim in range(len(shape)) if spec[dim] is None and shape[dim] % fsdp == 0]
    if fsdp > 1 and free:
        spec[max(free, key=lambda dim: shape[dim])] = "fsdp"
    return PartitionSpec(*spec)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and what of a batch goes where.

    One pass of all devices takes `rows` sequences; a batch takes `passes` of them. Of each sequence
    the logits of `positions` are held at a time; None is all.
    """

    mesh: Mesh
    rows: int
    passes: int
    positions: int | None = None

    @property
    def replicated(self) -> NamedSharding:
        """Every device holds all of it."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def batch(self) -> NamedSharding:
        """The sequences of a batch [passes, rows, T + 1] are split over the batch axes."""
        return NamedSharding(self.mesh, PartitionSpec(None, BATCH_AXES))

    def shard(self, tree: Any) -> Any:
        """The sharding of every array in a tree of arrays or ShapeDtypeStructs."""
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: NamedSharding(self.mesh, partition(path, leaf.shape, self.mesh)),
            tree,
        )

    def gather_tables(self, params: Params | AdaptedParams) -> Params | AdaptedParams:
        """Has the embedding tables whole on every device of `fsdp` while they are used.

        The compiler gathers the kernels by itself, layer by layer. Left alone with a table, it
        sends the activations around instead, which are larger.
        """
        if isinstance(params, AdaptedParams):
            return AdaptedParams(self._gather_tables(params.params), params.lora)
        return self._gather_tables(params)

    def _gather_tables(self, params: Params) -> Params:

        def gather(name: str, table: Any) -> Any:
            spec = partition((jax.tree_util.DictKey(name),), table.shape, self.mesh)
            whole = PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))
            return jax.lax.with_sharding_constraint(table, NamedSharding(self.mesh, whole))

        tables: Params = {
            name: {"embedding": gather(name, params[name]["embedding"])}
            for name in ("wte", "wpe", "lm_head")
            if name in params
        }
        return {**params, **tables}

    def place(self, tree: Any) -> Any:
        """Puts a tree of host arrays, the same in every process, where `shard` says."""

        def put(array: Any, sharding: NamedSharding) -> jax.Array:
            array = np.asarray(array)
            return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

        return jax.tree.map(put, tree, self.shard(tree))

    def put_rows(self, array: np.ndarray) -> jax.Array:
        """Splits a host array [rows, ...], the same in every process, over the batch axes."""
        sharding = NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))
        mine = array[_local_rows(sharding, len(array))]
        return jax.make_array_from_process_local_data(sharding, mine, array.shape)

    def load_batch(self, batches: Callable[..., np.ndarray], step: int) -> jax.Array:
        """Reads the batch of a step, each process its own rows: int32 [passes, rows, T + 1]."""
        mine = np.arange(self.rows)[_local_rows(self.batch, self.rows, dimension=1)]
        wanted_PR = np.arange(self.passes)[:, None] * self.rows + mine[None, :]
        tokens_BT = batches(step, wanted_PR.ravel())
        tokens_PRT = tokens_BT.reshape(*wanted_PR.shape, -1)
        shape = (self.passes, self.rows, tokens_PRT.shape[-1])
        return jax.make_array_from_process_local_data(self.batch, tokens_PRT, shape)


def make_layout(settings: TrainSettings) -> Layout:
    """Arranges the devices for a run.

    Raises:
      UserError: if mesh, batch and devices do not go together; the arithmetic is shown.
    """
    mesh = make_mesh(settings.mesh)
    data = settings.data
    ranks = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    rows = data.micro_batch_size * ranks
    if data.batch_size % rows:
        fitting = [n for n in range(1, data.batch_size + 1) if data.batch_size % (n * ranks) == 0]
        remedy = (
            f"a --data.micro_batch_size of {max(fitting)} or a divisor of it fits"
            if fitting
            else f"make --data.batch_size a multiple of {ranks}"
        )
        raise UserError(
            f"data.batch_size={data.batch_size} is not micro_batch_size x devices x passes: "
            f"{data.micro_batch_size} x {ranks} = {rows} sequences a pass do not divide it; "
            f"{remedy}"
        )
    platform = mesh.devices.flat[0].platform
    chunk = settings.loss_chunk or _LOSS_CHUNK.get(platform, _LOSS_CHUNK["gpu"])
    positions = max(1, chunk // data.micro_batch_size)
    return Layout(mesh, rows, data.batch_size // rows, positions)


def _local_rows(sharding: NamedSharding, rows: int, dimension: int = 0) -> slice:
    """The rows this process's devices hold: one run, since its devices are neighbours."""
    shape = (1,) * dimension + (rows,)
    indices = sharding.addressable_devices_indices_map(shape).values()
    mine = [index[dimension] for index in indices if index is not None]
    starts, stops = zip(*(part.indices(rows)[:2] for part in mine), strict=True)
    return slice(min(starts), max(stops))
