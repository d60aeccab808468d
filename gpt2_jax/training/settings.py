"""Everything a training run depends on, as frozen dataclasses that are also the flags.

A file in `configs/` holds one `TrainSettings` value named `config`; flags override its fields
(`--optimizer.learning_rate 3e-4`); the run directory keeps the result as `config.json`
(`gpt2_jax.training.config_files`).
"""

import dataclasses
import functools
import math
from typing import Annotated, Any, Literal

import tyro

from gpt2_jax.config import GPT2Config, check_positive_int, is_number
from gpt2_jax.errors import UserError
from gpt2_jax.lora_settings import LoraSettings


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """What the model learns from, and in what portions."""

    path: str = "data/shakespeare"
    """directory of token shards (scripts/prepare_*.py), a text file, whose last tenth is held out,
    or pydoc_data.topics: Python's own docs"""
    sequence_length: int = 1024
    """T, tokens in one training window; at most model.n_positions"""
    batch_size: int = 512
    """sequences in the global batch of one optimizer step; 512 x 1024 = 524,288 tokens"""
    micro_batch_size: int = 64
    """sequences in one pass of one device; gradients accumulate over the passes of a batch"""

    @property
    def tokens_per_step(self) -> int:
        """Tokens in the global batch."""
        return self.batch_size * self.sequence_length


PASS_TOKENS = 1024


def sequences_per_pass(batch_size: int, devices: int, sequence_length: int) -> int:
    """A micro-batch for fine-tuning: the most sequences of `PASS_TOKENS` tokens that divide.

    With a 124M model in bfloat16 such a pass needs 2.3 GB, and CPUs are fastest with few.

    Args:
      batch_size: sequences in the global batch.
      devices: among which the batch is split.
      sequence_length: T.
    """
    share, rest = divmod(batch_size, devices)
    sizes = [n for n in range(1, share + 1) if share % n == 0]
    fitting = [n for n in sizes if n * sequence_length <= PASS_TOKENS]
    return 1 if rest else max(fitting, default=1)


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """How the devices are arranged; one axis may be -1, which takes all that are left."""

    data: int = -1
    """groups of devices that split each batch, every group with all parameters"""
    fsdp: int = 1
    """devices that split the batch and also share out parameters and optimizer state"""
    tensor: int = 1
    """devices that split the width of every layer and work on the same sequences"""


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: float = 6e-4
    """peak, reached at the end of the warm-up"""
    final_learning_rate: float = 6e-5
    """reached at the last step"""
    warmup_steps: int = 715
    """steps of linear warm-up"""
    beta1: float = 0.9
    """decay of the gradient's running mean"""
    beta2: float = 0.95
    """decay of the squared gradient's running mean"""
    epsilon: float = 1e-8
    """added to the root of the second moment"""
    weight_decay: float = 0.1
    """decoupled decay, on matrices and embeddings only"""
    clip_norm: float = 1.0
    """the global gradient norm is scaled down to this"""
    max_skipped_steps: int = 10
    """a step whose gradient is not finite is skipped; this many in a row stop the run"""


@dataclasses.dataclass(frozen=True)
class ValidationSettings:
    """When and on how much the validation loss is measured."""

    every: int = 250
    """steps between measurements; also before the first step and after the last"""
    windows: int = 1024
    """validation windows used, always the first ones"""
    patience: int = 0
    """measurements in a row without a lower loss after which the run stops early; 0 for never"""
    reference_loss: float | None = None
    """loss of OpenAI's GPT-2 on the same windows, where it is known: a line in loss.png"""


@dataclasses.dataclass(frozen=True)
class SampleSettings:
    """Texts the model writes while it learns."""

    every: int = 0
    """steps between samples; also after the last; 0 for none"""
    prompt: str = "Hello, I'm a language model,"
    """what they begin with"""
    count: int = 2
    """texts each time"""
    max_new_tokens: int = 32
    """length of each; top_k 50 at temperature 1"""


@dataclasses.dataclass(frozen=True)
class HellaSwagSettings:
    """HellaSwag accuracy while the model learns, if its file is there."""

    path: str = "data/hellaswag_val.jsonl"
    """the 10,042 validation items as .jsonl or .jsonl.gz; nothing is measured without"""
    every: int = 0
    """steps between measurements; also after the last; 0 for none"""
    items: int = 10_042
    """items used, always the first ones"""


@dataclasses.dataclass(frozen=True)
class DistributedSettings:
    """Where this process stands among several; found by itself under a cluster's launcher."""

    coordinator: str | None = None
    """HOST:PORT of process 0, the same everywhere"""
    num_processes: int | None = None
    """processes in all"""
    process_id: int | None = None
    """this one's number, from 0"""


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """One training run.

    Raises:
      UserError: if a value is out of its range, or two don't go together.
    """

    run_dir: str
    """where config.json, metrics.jsonl, loss.png and checkpoints go"""
    steps: int
    """optimizer steps"""
    model: GPT2Config = GPT2Config(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    """the architecture"""
    data: DataSettings = DataSettings()
    """tokens and batches"""
    optimizer: OptimizerSettings = OptimizerSettings()
    """AdamW and its schedule"""
    mesh: MeshSettings = MeshSettings()
    """how the devices are arranged"""
    validation: ValidationSettings = ValidationSettings()
    """held-out loss"""
    samples: SampleSettings = SampleSettings()
    """texts while it trains"""
    hellaswag: HellaSwagSettings = HellaSwagSettings()
    """HellaSwag while it trains"""
    init_from: str | None = None
    """weights to start from: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a Hugging Face directory or
    a run; the architecture is then theirs, dropout and vocabulary padding stay as set here"""
    lora: Annotated[LoraSettings | None, tyro.conf.Suppress] = None
    """train an adapter beside frozen weights from `init_from`; None trains all parameters"""
    checkpoint_every: int = 1000
    """steps between checkpoints; also after the last step"""
    keep_checkpoints: int = 3
    """how many of the latest are kept; the one of the lowest validation loss always is"""
    log_every: int = 10
    """steps between printed lines where the output is not a terminal; metrics.jsonl has all"""
    tensorboard: bool = False
    """also write the metrics to run_dir/tensorboard"""
    wandb: str | None = None
    """also send the metrics to this Weights & Biases project"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """compute dtype; parameters and optimizer state are always float32"""
    remat: Literal["none", "dots", "block"] = "none"
    """what the backward pass computes again to save memory: nothing, all but matrix products,
    or whole blocks"""
    loss_chunk: int | None = None
    """tokens of one pass of a device whose logits are held at a time, the fewer the less memory;
    None chooses by platform"""
    seed: int = 1337
    """fixes initial weights, order of the data and dropout"""

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            check_positive_int(name, _field(self, name))
        for name in _NOT_NEGATIVE:
            _check_whole(name, _field(self, name))
        if type(self.seed) is not int or not 0 <= self.seed < 2**31:
            raise UserError(f"seed={self.seed} must be a whole number in [0, 2^31)")
        if self.loss_chunk is not None:
            check_positive_int("loss_chunk", self.loss_chunk)
        for name, allowed in _CHOICES.items():
            if _field(self, name) not in allowed:
                raise UserError(f"{name}={_field(self, name)!r} must be {' or '.join(allowed)}")
        if self.lora is not None and self.init_from is None:
            raise UserError("lora needs init_from: an adapter is trained beside existing weights")
        self._check_data()
        self._check_mesh()
        self._check_optimizer()
        reference = self.validation.reference_loss
        for name in _TEXT:
            value = _field(self, name)
            if value is None and name in ("init_from", "wandb"):
                continue
            if type(value) is not str or not value:
                raise UserError(f"{name}={value!r} must be text, and not empty")
        if type(self.tensorboard) is not bool:
            raise UserError(f"tensorboard={self.tensorboard!r} must be True or False")
        if reference is not None and not (is_number(reference) and 0 < reference < math.inf):
            raise UserError(f"validation.reference_loss={reference!r} must be finite and above 0")

    def _check_data(self) -> None:
        data = self.data
        if data.sequence_length > self.model.n_positions:
            raise UserError(
                f"data.sequence_length={data.sequence_length} is more than "
                f"model.n_positions={self.model.n_positions}; lower the one or raise the other"
            )
        if data.batch_size % data.micro_batch_size:
            raise UserError(
                f"data.batch_size={data.batch_size} is not a multiple of "
                f"data.micro_batch_size={data.micro_batch_size}; choose sizes that divide"
            )

    def _check_mesh(self) -> None:
        sizes = dataclasses.asdict(self.mesh)
        for name, size in sizes.items():
            if type(size) is not int or (size < 1 and size != -1):
                raise UserError(f"mesh.{name}={size} must be a whole number, at least 1, or -1")
        if list(sizes.values()).count(-1) > 1:
            raise UserError("only one axis of the mesh can be -1, which takes the devices left")

    def _check_optimizer(self) -> None:
        optimizer = self.optimizer
        for name in ("learning_rate", "final_learning_rate", "weight_decay"):
            value = getattr(optimizer, name)
            if not is_number(value) or not 0 <= value < math.inf:
                raise UserError(f"optimizer.{name}={value!r} must be finite and not negative")
        for name in ("epsilon", "clip_norm"):
            value = getattr(optimizer, name)
            if not is_number(value) or not 0 < value < math.inf:
                raise UserError(f"optimizer.{name}={value!r} must be finite and above 0")
        for name in ("beta1", "beta2"):
            value = getattr(optimizer, name)
            if not is_number(value) or not 0 <= value < 1:
                raise UserError(f"optimizer.{name}={value!r} must be in [0, 1)")


_POSITIVE = (
    "steps",
    "data.sequence_length",
    "data.batch_size",
    "data.micro_batch_size",
    "optimizer.max_skipped_steps",
    "validation.every",
    "validation.windows",
    "samples.count",
    "samples.max_new_tokens",
    "hellaswag.items",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
)
_TEXT = ("run_dir", "data.path", "samples.prompt", "hellaswag.path", "init_from", "wandb")
_NOT_NEGATIVE = (
    "optimizer.warmup_steps",
    "validation.patience",
    "samples.every",
    "hellaswag.every",
)
_CHOICES = {"dtype": ("bfloat16", "float32"), "remat": ("none", "dots", "block")}


def _field(settings: TrainSettings, name: str) -> Any:
    """A field by its dotted name."""
    return functools.reduce(getattr, name.split("."), settings)


def _check_whole(name: str, value: Any) -> None:
    if type(value) is not int or value < 0:
        raise UserError(f"{name}={value} must be a whole number, 0 or more")
