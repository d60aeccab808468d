"""Models and fixtures that the parity tests share."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import try_to_load_from_cache

from gpt2_jax.config import SIZES, GPT2Config
from gpt2_jax.interop.pretrained import DEFAULT_WEIGHTS, HUB_IDS
from gpt2_jax.interop.tokenizer_files import gpt2_files
from parity import outcomes
from parity.models import Models, pretrained_models, random_models
from parity.outcomes import Check, Prove

PROVEN = "parity"
"""The property of a test report under which its checks travel, also between processes."""

transformers.logging.set_verbosity_error()
if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes share the cores, and PyTorch's threads spin while they wait for each other.
    torch.set_num_threads(1)
transformers.logging.disable_progress_bar()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpt2",
        metavar="SOURCE",
        help="OpenAI's real 124M weights: a .pt or .safetensors file, or a directory; by default "
        "data/gpt2_weights.pt or the hub's cache, if they are there",
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Every figure that a test proved, the worst of each kind."""
    from rich.console import Console

    checks = [
        Check(**value)
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == PROVEN and report.when == "call"
    ]
    if checks:
        console = Console(width=None if terminalreporter.isatty else 170)
        with console.capture() as capture:
            title = "JAX against PyTorch: the worst of each check"
            console.print(outcomes.table_of(outcomes.worst_of_each(checks), title))
        terminalreporter.write_line(capture.get())


@pytest.fixture
def prove(record_property: Callable[[str, object], None]) -> Prove:
    """Asserts checks that have passed, and keeps them for the table at the end."""

    def prove(*checks: Check) -> None:
        for check in checks:
            record_property(PROVEN, dataclasses.asdict(check))
        for check in checks:
            assert check.passed, check

    return prove


@pytest.fixture(scope="session")
def small() -> Models:
    """Random weights at a small shape, large enough to make every layer matter."""
    config = GPT2Config(
        vocab_size=211,
        n_positions=48,
        n_embd=48,
        n_layer=3,
        n_head=3,
        initializer_range=0.2,
        # An untied head lets random weights continue with varied tokens, not with the last one.
        tie_word_embeddings=False,
    )
    return random_models(config, seed=1)


@pytest.fixture(scope="session")
def gpt2_124m() -> Models:
    """Random weights at the full 124M shape."""
    return random_models(SIZES["gpt2"], seed=0)


@pytest.fixture(scope="session")
def real_gpt2(request: pytest.FixtureRequest) -> Models:
    """OpenAI's weights, where they are at hand; nothing is downloaded."""
    source = request.config.getoption("--gpt2")
    if source is None:
        cached = try_to_load_from_cache(HUB_IDS["gpt2"], "model.safetensors")
        if DEFAULT_WEIGHTS.is_file():
            source = DEFAULT_WEIGHTS
        elif isinstance(cached, str):
            source = Path(cached).parent
        else:
            pytest.skip("OpenAI's weights are not here; give them with --gpt2 SOURCE")
    return pretrained_models(source)


@pytest.fixture(scope="session")
def gpt2_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Hugging Face's tokenizer, from the files that an export brings."""
    directory = tmp_path_factory.mktemp("tokenizer")
    for name, content in gpt2_files(1024).items():
        (directory / name).write_bytes(content)
    (directory / "config.json").write_text('{"model_type": "gpt2"}')
    return transformers.AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of published fixtures, named by GPT2_JAX_SHARED."""
    folder = os.environ.get("GPT2_JAX_SHARED")
    if not folder:
        pytest.skip("GPT2_JAX_SHARED does not name the folder of published fixtures")
    return Path(folder)
