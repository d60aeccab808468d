"""The flags of scripts/benchmark.py, for each thing that it measures."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gpt2_jax.benchmarks import hellaswag_scorers
from gpt2_jax.benchmarks.engines import ENGINE_NAMES, EngineName
from gpt2_jax.benchmarks.flag_checks import check_counts, check_not_empty, check_threads
from gpt2_jax.benchmarks.lora_load import CONTESTANTS, Contestant, Dtype, LoraLoad
from gpt2_jax.benchmarks.train_load import PEERS, KeepMemory, Peer, TrainLoad
from gpt2_jax.config import check_positive_int
from gpt2_jax.errors import UserError
from gpt2_jax.training.settings import TrainSettings


@dataclasses.dataclass(frozen=True)
class Train:
    """Time and memory of our training step, against plain Flax and PyTorch, by turns.

    All start from the same random weights and learn the same random tokens. Each is a process of
    its own that keeps its weights and moments while it waits.
    """

    what: tyro.conf.Positional[Literal["train"]] = "train"
    load: Annotated[TrainLoad, tyro.conf.arg(name="")] = TrainLoad()
    """the step"""
    peers: tuple[Peer, ...] = PEERS
    """who takes part beside gpt2_jax: plain is a step of Flax's and Optax's own parts, reference
    parity/reference.py on PyTorch, hf Hugging Face transformers; compiled by torch.compile. One
    that is not installed or fails is left out"""
    dtype: tuple[Dtype, ...] = ("float32", "bfloat16")
    """compute dtype; several are measured one after another, each with fresh processes, so that
    memory need hold one dtype's contestants at a time"""
    keep_memory: KeepMemory = "ours"
    """who allocates memory as our training scripts do, which makes everybody faster on a CPU
    (docs/performance.md); ours alone, as users run it all"""
    steps: int = 3
    """measured steps a round"""
    rounds: int = 3
    """how often each is measured, by turns; medians are compared"""
    threads: int | None = None
    """CPU cores to use; None takes all"""
    output: Path | None = None
    """also write the figures to this file, as JSON"""
    plot: Path | None = None
    """also draw tokens per second to this file, as PNG"""

    def __post_init__(self) -> None:
        check_counts(self, "steps", "rounds")
        check_not_empty(self, "dtype")
        check_threads(self.threads)
        if self.plot is not None and self.plot == self.output:
            raise UserError(f"--output and --plot are both {self.plot}; give two files")


@dataclasses.dataclass(frozen=True)
class Loop:
    """Tokens per second of the training loop against the bare jitted step, on random tokens.

    Every setting of the config is also a flag.
    """

    config: Path
    """the run to measure, one of configs/*.py or your own"""
    settings: Annotated[TrainSettings, tyro.conf.arg(name="")]
    what: tyro.conf.Positional[Literal["loop"]] = "loop"
    measured_steps: int = 30
    """steps in a round"""
    rounds: int = 3
    """how often each is measured, by turns"""
    output: Path | None = None
    """also write the figures to this file, as JSON"""

    def __post_init__(self) -> None:
        check_counts(self, "measured_steps", "rounds")


@dataclasses.dataclass(frozen=True)
class Memory:
    """What the compiled training step asks of each device. Every setting is also a flag."""

    config: Path
    """the run to measure, one of configs/*.py or your own"""
    settings: Annotated[TrainSettings, tyro.conf.arg(name="")]
    what: tyro.conf.Positional[Literal["memory"]] = "memory"
    output: Path | None = None
    """also write the figures to this file, as JSON"""


@dataclasses.dataclass(frozen=True)
class Generate:
    """Speed of greedy generation, ours against whatever else is installed, by turns.

    All have the same weights and prompts and make the same number of tokens.
    """

    what: tyro.conf.Positional[Literal["generate"]] = "generate"
    engines: tuple[EngineName, ...] = ENGINE_NAMES
    """hf is Hugging Face transformers, ct2 CTranslate2, llama llama.cpp; one that is not
    installed is left out"""
    batch: tuple[int, ...] = (1,)
    """how many prompts are continued at once; several numbers are measured one after another"""
    prompt_tokens: int = 32
    """length of each prompt"""
    new_tokens: int = 128
    """how many tokens are made for each"""
    rounds: int = 5
    """how often each engine is measured, by turns; medians are compared"""
    threads: int | None = None
    """CPU cores to use; None takes all"""
    source: str | None = None
    """weights as generate.py takes them: pretrained, a run or a Hugging Face directory; None
    draws random ones, with which all is as fast"""
    model: str | None = None
    """size of pretrained or random weights: gpt2 (the default), gpt2-medium ..."""
    shell: bool = True
    """also measure how long generate.py takes from the shell to its first word"""
    output: Path | None = None
    """also write the figures to this file, as JSON"""

    def __post_init__(self) -> None:
        check_counts(self, "prompt_tokens", "rounds")
        check_not_empty(self, "engines", "batch")
        for batch in self.batch:
            check_positive_int("batch", batch)
        if self.new_tokens < 2:
            raise UserError(
                f"new_tokens={self.new_tokens} must be at least 2, or nothing is decoded"
            )
        check_threads(self.threads)


@dataclasses.dataclass(frozen=True)
class Lora:
    """Time and memory of a LoRA step, against training all weights and against PEFT, by turns.

    All start from the same random weights and adapter and learn the same random tokens.
    """

    what: tyro.conf.Positional[Literal["lora"]] = "lora"
    load: Annotated[LoraLoad, tyro.conf.arg(name="")] = LoraLoad()
    """the step"""
    contestants: tuple[Contestant, ...] = CONTESTANTS
    """lora and full are gpt2_jax with an adapter and with all weights, peft is Hugging Face's PEFT
    on PyTorch, left out if it is not installed"""
    dtype: tuple[Dtype, ...] = ("bfloat16",)
    """compute dtype; several are measured one after another"""
    steps: int = 3
    """measured steps a round"""
    rounds: int = 3
    """how often each is measured, by turns; medians are compared"""
    threads: int | None = None
    """CPU cores to use; None takes all"""
    output: Path | None = None
    """also write the figures to this file, as JSON"""

    def __post_init__(self) -> None:
        check_counts(self, "steps", "rounds")
        check_not_empty(self, "contestants", "dtype")
        check_threads(self.threads)


@dataclasses.dataclass(frozen=True)
class HellaSwag:
    """Speed of scoring HellaSwag by lm-evaluation-harness's protocol, against PyTorch, by turns.

    All score the same items with the same weights. Tokens are counted for all of the items.
    """

    what: tyro.conf.Positional[Literal["hellaswag"]] = "hellaswag"
    data: Path | None = None
    """items as .jsonl or .jsonl.gz; None is the validation set, as for eval_hellaswag.py"""
    items: int = 96
    """how many to score, spread over the file"""
    contestants: tuple[hellaswag_scorers.Contestant, ...] = hellaswag_scorers.CONTESTANTS
    """ours; torch, one text at a time; harness, lm-evaluation-harness with its hf model. One that
    is not installed is left out"""
    dtype: tuple[Dtype, ...] = ("float32",)
    """compute dtype, and that of PyTorch's weights; several are measured one after another"""
    batch: tuple[int, ...] = (4, 8, 16)
    """rows of a batch; of several, each contestant takes what is fastest for it"""
    rounds: int = 2
    """how often each is measured, by turns; medians are compared"""
    threads: int | None = None
    """CPU cores to use; None takes all"""
    source: str | None = None
    """weights as eval_hellaswag.py takes them; None draws random ones, with which all is as fast"""
    model: str | None = None
    """size of pretrained or random weights: gpt2 (the default), gpt2-medium ..."""
    output: Path | None = None
    """also write the figures to this file, as JSON"""

    def __post_init__(self) -> None:
        check_counts(self, "items", "rounds")
        check_not_empty(self, "contestants", "dtype", "batch")
        for batch in self.batch:
            check_positive_int("batch", batch)
        check_threads(self.threads)


@dataclasses.dataclass(frozen=True)
class Rounding:
    """What storing the weights in fewer bits costs, on a text the model was not trained on."""

    text: Path
    """UTF-8 file to read"""
    source: str
    """the model: pretrained, a run directory or a Hugging Face directory"""
    what: tyro.conf.Positional[Literal["rounding"]] = "rounding"
    last: float = 1.0
    """read only this last fraction of the text, such as 0.1 for the part held out in training"""
    tokens: int = 50_000
    """how many to predict, at most"""
    output: Path | None = None
    """also write the figures to this file, as JSON"""

    def __post_init__(self) -> None:
        check_counts(self, "tokens")
        if not 0 < self.last <= 1:
            raise UserError(f"last={self.last} must be in (0, 1]; 1 reads the whole text")
