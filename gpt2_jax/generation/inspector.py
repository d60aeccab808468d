"""The token inspector: how probable each generated token was, and what else the model thought of.

All probabilities are the model's own, before temperature, top-k and the other sampling rules.
"""

import dataclasses
import math
import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.table import Table
from rich.text import Text

from gpt2_jax import tokenizer

if TYPE_CHECKING:  # the decoder imports JAX, which takes seconds
    from gpt2_jax.generation.decode import NewToken

LEVELS = (("50% or more", 0.5), ("20 to 50%", 0.2), ("5 to 20%", 0.05), ("1 to 5%", 0.01))
"""Names and smallest probabilities of the colours; one more, "below 1%", is for the rest."""

# Blue to orange, which all kinds of colour vision tell apart; with black text on any terminal.
_COLOURS = ("#9cc9ec", "#d3e6f5", "#f6eccb", "#f9cf8c", "#f0975a")
_PROMPT_SHOWN = 60
_WIDEST_TOKEN = 24
_WIDEST_ALTERNATIVE = 22
_WIDEST_NUMBER = 7
_GAP = 2


@dataclasses.dataclass(frozen=True)
class Alternative:
    """A token the model could have chosen.

    Attributes:
      id: in the vocabulary.
      text: what it stands for; bytes that are no whole UTF-8 character are kept as lone
        surrogates (PEP 383), so that the texts of several tokens join to what they mean.
      logprob: natural logarithm of its probability.
    """

    id: int
    text: str
    logprob: float

    @property
    def probability(self) -> float:
        """From 0 to 1."""
        return math.exp(min(self.logprob, 0.0))  # rounding can leave it a little above 0

    @property
    def bits(self) -> float:
        """Surprise: -log2 of the probability."""
        return abs(min(self.logprob, 0.0)) / math.log(2)

    @property
    def level(self) -> int:
        """Which colour it has: 0 is the most probable; NaN is the least."""
        return sum(not self.probability >= smallest for _, smallest in LEVELS)


@dataclasses.dataclass(frozen=True)
class ExplainedToken(Alternative):
    """A generated token, with the likeliest ones in its place, likeliest first."""

    alternatives: tuple[Alternative, ...]

    @property
    def rank(self) -> int | None:
        """1 for the likeliest token; None if it is not among the alternatives."""
        ids = [alternative.id for alternative in self.alternatives]
        return ids.index(self.id) + 1 if self.id in ids else None


@dataclasses.dataclass(frozen=True)
class ExplainedText:
    """A prompt and the tokens that continue it."""

    prompt: str
    tokens: tuple[ExplainedToken, ...]

    @property
    def mean_logprob(self) -> float:
        """In nats a token; NaN if there is none."""
        if not self.tokens:
            return math.nan
        return math.fsum(token.logprob for token in self.tokens) / len(self.tokens)

    @property
    def perplexity(self) -> float:
        """exp(-mean log-probability)."""
        mean = self.mean_logprob
        return math.inf if mean < -700 else math.exp(-mean)

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What to say about the whole: names and values."""
        return [
            ("tokens", str(len(self.tokens))),
            ("mean log-probability", f"{self.mean_logprob:.3f}"),
            ("perplexity", f"{self.perplexity:,.1f}"),
        ]


def explain(prompt: str, tokens: Iterable["NewToken"], *, ids: bool = False) -> ExplainedText:
    """Puts words to what `stream(..., alternatives=k)` told about a row.

    Args:
      prompt: what was continued.
      tokens: the row's, in order.
      ids: the vocabulary is not GPT-2's, so that tokens can be shown by their ids only, as <7>.
        So are those that GPT-2 does not have, of a padded vocabulary.
    """

    def text_of(token: int) -> str:
        if ids or token >= tokenizer.VOCAB_SIZE:
            return f"<{token}>"
        return tokenizer.token_bytes(token).decode("utf-8", errors="surrogateescape")

    return ExplainedText(
        prompt,
        tuple(
            ExplainedToken(
                new.token,
                text_of(new.token),
                new.logprob,
                tuple(Alternative(token, text_of(token), lp) for token, lp in new.alternatives),
            )
            for new in tokens
        ),
    )


def visible(text: str) -> str:
    r"""A token as one visible word: "\n" for a newline, "␣" for a space, "\xf0" for a bare byte.

    Nothing in it acts on a terminal, changes the direction of writing or cannot be seen.
    """
    word = "".join(map(spelt, text)).replace(" ", "␣")
    # An accent without its letter would sit on whatever stands before it.
    return "◌" + word if text and unicodedata.category(text[0]).startswith("M") else word


def spelt(character: str) -> str:
    r"""A character as it is if it can be seen, else as Python escapes it; "\" becomes "\\"."""
    code = ord(character)
    if code < 0x80:
        return character.encode("unicode_escape").decode()
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    # U+FFFD can be seen, but would be taken for a failure of ours.
    if character.isprintable() and character != "\N{REPLACEMENT CHARACTER}":
        return character
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def percent(probability: float) -> str:
    """Such as "12.3%"; too small ones are "<0.1%", NaN is "nan%"."""
    return "<0.1%" if 0 <= probability < 0.0005 else f"{probability:.1%}"


def rank_text(token: ExplainedToken) -> str:
    """Such as "2", or ">5" for a token that is not among the five likeliest."""
    if not token.alternatives:
        return ""
    return str(token.rank or f">{len(token.alternatives)}")


def width_of_lines(text: ExplainedText) -> int:
    """How wide a console must be for `token_table` to give each token one line; 80 at least."""
    numbers = 3 * (_WIDEST_NUMBER + _GAP)
    alternatives = max((len(token.alternatives) for token in text.tokens), default=0)
    return max(80, _WIDEST_TOKEN + _GAP + numbers + alternatives * (_WIDEST_ALTERNATIVE + _GAP))


def token_table(text: ExplainedText) -> Table:
    """The text as a table for `rich.console.Console.print`, fit for 80 columns.

    Colours tell the probability a second time; a console that writes to a file has none.
    """
    cut = "…" if len(text.prompt) > _PROMPT_SHOWN else ""
    prompt = cut + "".join(map(spelt, text.prompt[-_PROMPT_SHOWN:]))
    table = Table(
        title=Text(prompt, style="dim"),
        title_justify="left",
        caption=Text("  ".join(f"{name} {value}" for name, value in text.facts)),
        caption_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, _GAP, 0, 0),
    )
    table.add_column("token", overflow="fold", max_width=_WIDEST_TOKEN)
    for name in ("prob", "rank", "bits"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("likeliest tokens")
    words = [_words(token) for token in text.tokens]
    width = min(max((w.cell_len for row in words for w in row), default=1), _WIDEST_ALTERNATIVE)
    for token, alternatives in zip(text.tokens, words, strict=True):
        style = Style(color="black", bgcolor=_COLOURS[token.level])
        table.add_row(
            Text(visible(token.text), style=style),
            Text(percent(token.probability), style=style),
            Text(rank_text(token)),
            Text(f"{token.bits:.1f}"),
            _Aligned(alternatives, width),
        )
    return table


@dataclasses.dataclass(frozen=True)
class _Aligned:
    """Words in columns, which are where they are in the other rows of a table."""

    words: list[Text]
    width: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(self.width, options.max_width)
        count = max(1, (options.max_width + _GAP) // (width + _GAP))
        grid = Table.grid(padding=(0, _GAP, 0, 0), pad_edge=False)
        for _ in range(count):
            grid.add_column(no_wrap=True, width=width)
        for start in range(0, len(self.words), count):
            grid.add_row(*self.words[start : start + count])
        yield grid


def _words(token: ExplainedToken) -> list[Text]:
    return [
        Text(f"{percent(a.probability):>6} {visible(a.text)}", "bold" if a.id == token.id else "")
        for a in token.alternatives
    ]
