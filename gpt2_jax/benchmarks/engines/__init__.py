"""Everything that `benchmark.py generate` measures: ours, and what users might pick instead.

An engine is a class `Engine(model, precision)` in a module of this folder, which continues prompts
greedily with `generate(prompts, max_new_tokens)`. It runs in a process of its own, so that nobody's
threads and memory are in the way of another's, and takes all CPU cores that this process has.
"""

import dataclasses
import importlib
import importlib.util
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, get_args

from gpt2_jax.config import GPT2Config

EngineName = Literal[
    "ours-f32",
    "llama-f32",
    "ct2-f32",
    "hf-f32",
    "ours-bf16",
    "llama-f16",
    "hf-bf16",
    "ours-int8",
    "llama-q8_0",
    "ct2-int8",
]
ENGINE_NAMES: tuple[EngineName, ...] = get_args(EngineName)
"""In the order of their turns: what will be compared is measured close together."""


class ModelFiles(NamedTuple):
    """The model that every engine loads.

    Attributes:
      directory: model.safetensors and config.json, as Hugging Face has them; an engine may put
        files of its own beside them.
      config: its configuration, which has no <|endoftext|>.
    """

    directory: Path
    config: GPT2Config


class Engine(Protocol):
    """Continues prompts with one model.

    Attributes:
      device: where it runs, "cpu" or "gpu".
    """

    device: str

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """The likeliest continuation of each prompt, of exactly so many tokens.

        Args:
          prompts: token ids, all of one length.
          max_new_tokens: for each; no token ends a text.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Family:
    """An implementation of GPT-2.

    Attributes:
      title: as its authors write it.
      module: where its `Engine` is, in this folder.
      packages: what it imports, by the names that pip knows.
    """

    title: str
    module: str
    packages: dict[str, str]


FAMILIES = {
    "ours": Family("gpt2_jax", "ours", {}),
    "hf": Family(
        "Hugging Face", "hugging_face", {"torch": "torch", "transformers": "transformers"}
    ),
    "ct2": Family("CTranslate2", "ct2", {"ctranslate2": "ctranslate2"}),
    "llama": Family("llama.cpp", "llama_cpp", {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}),
}


def family(name: str) -> Family:
    """Of an engine's name, such as "llama-q8_0"."""
    return FAMILIES[name.split("-")[0]]


def precision(name: str) -> str:
    """Of an engine's name: q8_0 of llama-q8_0."""
    return name.split("-")[1]


def title(name: str) -> str:
    """An engine's name for people: llama.cpp q8_0."""
    return f"{family(name).title} {precision(name)}"


def missing_packages(name: str) -> list[str]:
    """What pip would have to install for an engine."""
    return [
        package
        for module, package in family(name).packages.items()
        if importlib.util.find_spec(module) is None
    ]


def open_engine(name: str, model: ModelFiles) -> Engine:
    """Loads a model into an engine, in this process."""
    module = importlib.import_module(f"{__name__}.{family(name).module}")
    engine: Engine = module.Engine(model, precision(name))
    return engine
