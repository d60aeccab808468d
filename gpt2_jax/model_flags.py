"""The flags of every evaluation: which model, and how it is run."""

import contextlib
import dataclasses
import importlib.metadata
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from gpt2_jax.config import check_positive_int
from gpt2_jax.errors import UserError

if TYPE_CHECKING:  # they import JAX, which takes a second
    from gpt2_jax.model import GPT2, Params
    from gpt2_jax.training.mesh import Layout

# Rows that a device takes at once. On two cores 4 were as fast as any; a GPU wants more to do.
_ROWS_OF_CPU = 4
_ROWS_OF_ACCELERATOR = 64


@dataclasses.dataclass(frozen=True)
class ModelFlags:
    """The model that is evaluated; all devices share the work."""

    source: str = "pretrained"
    """pretrained, a size, a run directory of train.py, or a Hugging Face model directory"""
    model: str | None = None
    """pretrained size: gpt2 (the default), gpt2-medium, gpt2-large or gpt2-xl"""
    weights: str | None = None
    """pretrained weights from here, not the hub: a .pt or .safetensors file, or a directory"""
    revision: str | None = None
    """branch, tag or commit of the pretrained model on the hub"""
    lora: str | None = None
    """directory of a LoRA adapter, merged into the model: the adapted one is evaluated"""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """of the arithmetic; bfloat16 is faster, float32 is exact"""
    batch_size: int | None = None
    """rows in a forward pass of all devices, on which results do not depend; None takes 4 for
    each CPU device and 64 for each other"""

    def check(self) -> None:
        """Raises UserError for a value out of its range, before anything slow."""
        if self.batch_size is not None:
            check_positive_int("batch_size", self.batch_size)

    @property
    def name(self) -> str:
        """The model in a word or two."""
        if self.source != "pretrained":
            return self.source
        return " ".join(filter(None, (self.model or "gpt2", self.weights, self.revision)))

    def layout(self) -> "Layout":
        """Splits the rows of a batch over all devices.

        Raises:
          UserError: if the batch cannot be split evenly.
        """
        import jax

        from gpt2_jax.training.mesh import Layout, make_mesh
        from gpt2_jax.training.settings import MeshSettings

        mesh = make_mesh(MeshSettings())
        rows = self.batch_size
        if rows is None:
            on_cpu = jax.default_backend() == "cpu"
            rows = mesh.size * (_ROWS_OF_CPU if on_cpu else _ROWS_OF_ACCELERATOR)
        if rows % mesh.size:
            raise UserError(
                f"batch_size={rows} must be a multiple of the {mesh.size} devices, which share "
                f"the rows; {-(-rows // mesh.size) * mesh.size} fits"
            )
        return Layout(mesh, rows=rows, passes=1)

    def load(self, layout: "Layout") -> "Evaluated":
        """Loads the model onto all devices.

        Raises:
          UserError: as `load_source` does.
        """
        import jax

        from gpt2_jax.model import GPT2
        from gpt2_jax.sources import load_source

        params, config = load_source(
            self.source,
            model=self.model,
            weights=self.weights,
            revision=self.revision,
            lora=self.lora,
        )
        params = jax.device_put(params, layout.replicated)
        return Evaluated(GPT2(config, dtype=self.dtype), params, layout)

    def facts(self, layout: "Layout") -> dict[str, Any]:
        """What results were made with, for their file."""
        import jax

        device = jax.devices()[0].device_kind
        return {
            **dataclasses.asdict(self),
            "batch_size": layout.rows,
            "devices": f"{layout.mesh.size} x {device} ({jax.default_backend()})",
            "versions": _versions("gpt2-jax", "jax", "jaxlib", "flax", "tiktoken"),
        }


class Evaluated(NamedTuple):
    """A model on its devices."""

    model: "GPT2"
    params: "Params"
    layout: "Layout"


@contextlib.contextmanager
def explained_memory(layout: "Layout") -> Iterator[None]:
    """Tells in one line that the devices have too little memory."""
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"the devices have too little memory for batches of {layout.rows}; give a smaller "
            f"--batch_size, or --dtype bfloat16"
        ) from error


def _versions(*packages: str) -> dict[str, str | None]:
    """Versions of packages; None of one that is not installed, such as a bare checkout."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found
