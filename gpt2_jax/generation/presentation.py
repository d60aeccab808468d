"""What is shown beside the texts: whose they are, what cuts them short, tables and a page."""

import sys
from collections.abc import Sequence
from pathlib import Path

from gpt2_jax.config import GPT2Config
from gpt2_jax.generation.samples import Sample
from gpt2_jax.generation.text_stream import Notation

# The inspector and the decoder are imported where they are used: they take long.


def print_heading(lora: str | None, *, tables: bool) -> None:
    """Says which adapter the texts that follow are of.

    Args:
      lora: its directory.
      tables: whether tables follow on stderr, which then needs the heading too, unless stdout
        is on the same terminal.
    """
    print(f"== {lora}", flush=True)
    if tables and not sys.stdout.isatty():
        print(f"== {lora}", file=sys.stderr)


def note_limits(prompts: Sequence[Sequence[int]], config: GPT2Config, wanted: int) -> None:
    """Says for which prompts the context will be full before all that is wanted is there."""
    from gpt2_jax.generation.decode import room

    for index, prompt in enumerate(prompts):
        fits = room(config, len(prompt))
        if wanted > fits:
            which = f"prompt {index}" if len(prompts) > 1 else "the prompt"
            print(
                f"note: only {fits} of {wanted} new tokens fit after {which} into the context of "
                f"{config.n_positions}; --overflow slide goes on beyond it",
                file=sys.stderr,
            )


def print_table(sample: Sample, notation: Notation) -> None:
    """Prints a sample's tokens with their probabilities to stderr."""
    from rich.console import Console

    from gpt2_jax.generation.inspector import explain, token_table, width_of_lines

    sys.stdout.flush()
    text = explain(notation.decode(sample.prompt), sample.new, ids=notation.ids)
    console = Console(stderr=True)
    if not sys.stderr.isatty():
        console.width = width_of_lines(text)  # in a file or a pipe a token is a line
    console.print(token_table(text))


def write_samples_page(
    file: Path, samples: Sequence[Sample], adapters: Sequence[str], notation: Notation
) -> None:
    """Writes the token inspector's page.

    Args:
      file: the page.
      samples: in the order of the adapters, equally many of each.
      adapters: their directories; where there are several, the page says whose each sample is.
      notation: that of the model.

    Raises:
      UserError: if the file cannot be written.
    """
    from gpt2_jax.generation.inspector import explain
    from gpt2_jax.generation.inspector_page import write_page

    texts = [explain(notation.decode(s.prompt), s.new, ids=notation.ids) for s in samples]
    write_page(file, texts, note=_whose(adapters, len(samples)) if len(adapters) > 1 else "")


def _whose(adapters: Sequence[str], count: int) -> str:
    """Such as "Samples 1 to 2: first; samples 3 to 4: second"."""
    each = count // len(adapters)
    parts = []
    for index, adapter in enumerate(adapters):
        first, last = index * each + 1, (index + 1) * each
        which = f"sample {first}" if each == 1 else f"samples {first} to {last}"
        parts.append(f"{which}: {adapter}")
    note = "; ".join(parts)
    return note[0].upper() + note[1:]
