"""Fine-tunes with LoRA: python scripts/finetune_lora.py --text mine.txt.

Trains a small adapter beside a frozen GPT-2. The same command goes on with a run that was stopped.
"""

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gpt2_jax.allocator import restart_keeping_memory
from gpt2_jax.cli import keep_compiled_programs, parse_flags, run
from gpt2_jax.config import GPT2Config
from gpt2_jax.errors import UserError
from gpt2_jax.lora_settings import LoraSettings
from gpt2_jax.training.settings import (
    DataSettings,
    DistributedSettings,
    MeshSettings,
    OptimizerSettings,
    SampleSettings,
    TrainSettings,
    ValidationSettings,
    sequences_per_pass,
)

if TYPE_CHECKING:
    from gpt2_jax.sources import Place

SEQUENCE_LENGTH = 512


@dataclasses.dataclass(frozen=True)
class Batches:
    """What the adapter learns from in one step."""

    batch_size: int = 8
    """sequences in the global batch of one optimizer step"""
    micro_batch_size: int | None = None
    """sequences in one pass of one device; None takes what has at most 1,024 tokens, for which a
    124M base needs 2.3 GB in bfloat16, and which CPUs like best"""
    sequence_length: int | None = None
    """T, tokens in one training window; None takes 512, or the base's context if that is less"""


@dataclasses.dataclass(frozen=True)
class Flags:
    """Trains a LoRA adapter on text and writes it to RUN_DIR/adapter, in PEFT's format."""

    data: Path | None = None
    """directory of token shards (scripts/prepare_custom_text.py)"""
    text: Path | None = None
    """instead of --data, a UTF-8 text file; its last tenth is held out"""
    source: str = "pretrained"
    """the frozen base: pretrained, a size, a run directory of train.py, or a Hugging Face model
    directory"""
    model: str | None = None
    """pretrained size: gpt2 (the default), gpt2-medium, gpt2-large or gpt2-xl"""
    weights: str | None = None
    """pretrained weights from here, not the hub: a .pt or .safetensors file, or a directory"""
    revision: str | None = None
    """branch, tag or commit of the pretrained model on the hub"""
    run_dir: Path = Path("runs/lora")
    """where the run and its adapter go"""
    steps: int = 500
    """optimizer steps, at most"""
    lora: Annotated[LoraSettings, tyro.conf.arg(name="")] = LoraSettings()
    """the adapter"""
    batches: Annotated[Batches, tyro.conf.arg(name="data")] = Batches()
    """batches"""
    optimizer: OptimizerSettings = OptimizerSettings(
        learning_rate=1e-3,
        final_learning_rate=1e-4,
        warmup_steps=20,
        beta2=0.999,
        weight_decay=0.0,
    )
    """AdamW and its schedule"""
    validation: ValidationSettings = ValidationSettings(every=50, windows=64, patience=4)
    """held-out loss; a checkpoint goes with each measurement"""
    samples: SampleSettings = SampleSettings()
    """texts while it trains"""
    mesh: MeshSettings = MeshSettings()
    """how the devices are arranged"""
    keep_checkpoints: int = 1
    """how many of the latest are kept; the one of the lowest validation loss always is"""
    log_every: int = 10
    """steps between printed lines where the output is not a terminal; metrics.jsonl has all"""
    tensorboard: bool = False
    """also write the metrics to run_dir/tensorboard"""
    wandb: str | None = None
    """also send the metrics to this Weights & Biases project"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """compute dtype; the adapter and its optimizer state are always float32"""
    remat: Literal["none", "dots", "block"] = "none"
    """what the backward pass computes again to save memory, see train.py"""
    seed: int = 1337
    """fixes the first adapter, order of the data and dropout"""
    resume: bool = False
    """insist on a run to go on with; without it too, a run with the same settings is resumed"""
    allow_changes: bool = False
    """go on with the run in run_dir even though settings or data have changed; another base never
    will do"""
    overwrite: bool = False
    """replace the run that is already in run_dir"""
    profile: bool = False
    """write a JAX trace of three steps to run_dir/profile"""
    distributed: DistributedSettings = DistributedSettings()
    """processes on several hosts"""


def main() -> None:
    """Checks the flags, loads the base, trains, and says how to use what came out."""
    flags = parse_flags(Flags)
    path = _data(flags)
    # Mistakes are told before anything is loaded, but for those that depend on the base.
    longest = max(flags.batches.sequence_length or 1, SEQUENCE_LENGTH)
    _settings(flags, path, "the base", GPT2Config(n_positions=longest), 1)

    # Only now the slow imports, so that --help and mistakes answer at once.
    import jax

    from gpt2_jax.sources import find_source, load_source
    from gpt2_jax.training.distributed import join_cluster
    from gpt2_jax.training.mesh import BATCH_AXES, make_mesh

    names: dict[str, Any] = {
        name: getattr(flags, name) for name in ("model", "weights", "revision")
    }
    place = find_source(flags.source, **names)
    base, theirs = str(place.name), _hugging_face_name(place)
    join_cluster(flags.distributed)
    keep_compiled_programs()
    mesh = make_mesh(flags.mesh)
    devices = mesh.shape[BATCH_AXES[0]] * mesh.shape[BATCH_AXES[1]]
    params, config = load_source(flags.source, **names)
    params = jax.device_get(params)  # the run puts its own copy where it is needed
    settings = _settings(flags, path, base, config, devices)

    from gpt2_jax.finetuning import describe, finetune

    adapter = finetune(
        settings,
        (params, config),
        base=theirs,
        revision=flags.revision,
        resume=flags.resume,
        overwrite=flags.overwrite,
        allow_changes=flags.allow_changes,
        profile=flags.profile,
    )
    if adapter is not None:
        print(describe(adapter))
        print(f"adapter: {adapter.directory}, {adapter.size:,} bytes; use it with")
        _advise(flags, path, theirs, adapter.directory, config)


def _hugging_face_name(place: "Place") -> str | None:
    """What transformers opens the base by; None if it has to be exported first."""
    from gpt2_jax.interop.pretrained import HUB_IDS

    if place.name in HUB_IDS:
        return HUB_IDS[str(place.name)]
    is_theirs = not place.is_run and (Path(place.name) / "config.json").exists()
    return str(place.name) if is_theirs else None


def _data(flags: Flags) -> str:
    if (flags.data is None) == (flags.text is None):
        raise UserError(
            "give --data DIR, made by scripts/prepare_custom_text.py, or --text FILE, and not both"
        )
    if flags.data is not None:
        if not flags.data.is_dir():
            raise UserError(
                f"data {flags.data} is no directory; make one with scripts/prepare_custom_text.py, "
                f"or give a text file as --text"
            )
        return str(flags.data)
    assert flags.text is not None
    if not flags.text.is_file():
        raise UserError(f"text {flags.text} is no file; give a UTF-8 text file")
    return str(flags.text)


def _settings(
    flags: Flags, path: str, base: str, config: GPT2Config, devices: int
) -> TrainSettings:
    """The run that the flags ask for, on so many devices that split the batch."""
    batches = flags.batches
    length, micro = batches.sequence_length, batches.micro_batch_size
    if length is None:
        length = min(SEQUENCE_LENGTH, config.n_positions)
    elif length > config.n_positions:
        raise UserError(
            f"data.sequence_length={length} is more than the context of {base}, "
            f"{config.n_positions} tokens; lower it"
        )
    if micro is None:
        micro = sequences_per_pass(batches.batch_size, devices, length)
    return TrainSettings(
        run_dir=str(flags.run_dir),
        steps=flags.steps,
        model=dataclasses.replace(config, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0),
        data=DataSettings(path, length, batches.batch_size, micro),
        optimizer=flags.optimizer,
        mesh=flags.mesh,
        validation=flags.validation,
        samples=flags.samples,
        init_from=base,
        lora=flags.lora,
        checkpoint_every=flags.validation.every,
        keep_checkpoints=flags.keep_checkpoints,
        log_every=flags.log_every,
        tensorboard=flags.tensorboard,
        wandb=flags.wandb,
        dtype=flags.dtype,
        remat=flags.remat,
        seed=flags.seed,
    )


def _advise(
    flags: Flags, path: str, theirs: str | None, directory: Path, config: GPT2Config
) -> None:
    """Says what can be done with the adapter, in commands that can be copied."""
    from gpt2_jax.generation.text_stream import speaks_gpt2

    names = ("source", "model", "weights", "revision")
    given = {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}
    source = " ".join(f"--{name} {shlex.quote(value)}" for name, value in given.items())
    lora = f"--lora {shlex.quote(str(directory))}"
    prompt = "Once" if speaks_gpt2(config) else "0"  # a token id, where there is no text
    print(f"  python scripts/generate.py {source} {lora} --prompt {prompt}")
    print(f"  python scripts/compare_outputs.py {source} {lora} --data {shlex.quote(path)}")
    if theirs is None:
        print(f"  python scripts/export_hf.py {source} --output DIR   # a base that PEFT opens")
        theirs = "DIR"
    revision = "" if flags.revision is None else f", revision={flags.revision!r}"
    base = f"transformers.AutoModelForCausalLM.from_pretrained({theirs!r}{revision})"
    print(f"  peft.PeftModel.from_pretrained({base}, {str(directory)!r})")


if __name__ == "__main__":
    restart_keeping_memory()
    run(main)
