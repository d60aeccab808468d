"""How long a user waits at the shell for the first word of scripts/generate.py."""

import os
import subprocess
import sys
import time
from pathlib import Path

from gpt2_jax.benchmarks.engines import ModelFiles
from gpt2_jax.generation.text_stream import speaks_gpt2

RUNS = 2


def first_word(script: Path, model: ModelFiles, precision: str, cache: Path) -> list[float]:
    """Starts the script several times, with the same cache of compiled programs, empty at first.

    Args:
      script: scripts/generate.py.
      model: what the script is given.
      precision: the script's.
      cache: a directory for the compiled programs.

    Returns:
      Seconds from the start of the process until text follows the prompt, of each run: imports,
      reading the weights and, in the first, compilation are counted.

    Raises:
      RuntimeError: if the script fails.
    """
    prompt = "Hello, my name is" if speaks_gpt2(model.config) else "0"
    command = [sys.executable, str(script), "--source", str(model.directory), "--prompt", prompt]
    command += ["--precision", precision, "--greedy", "--max_new_tokens", "20"]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    return [_wait(command, environment, len(prompt)) for _ in range(RUNS)]


def _wait(command: list[str], environment: dict[str, str], prompt_length: int) -> float:
    """Seconds until more has been written than the prompt, with which the text begins."""
    start = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        written = 0
        while written <= prompt_length and (piece := process.stdout.read(4096)):
            written += len(piece)
        seconds = time.perf_counter() - start
        process.communicate()
    if process.returncode or written <= prompt_length:
        raise RuntimeError(f"{' '.join(command)} failed with exit status {process.returncode}")
    return seconds
