"""Where prompts come from: flags, files, standard input, and a person at the keyboard."""

import contextlib
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from gpt2_jax.errors import UserError
from gpt2_jax.files import read_text
from gpt2_jax.tokenizer import check_unicode

STDIN = "-"
_SIGN = "> "


def gather(texts: Sequence[str], files: Sequence[str]) -> list[str]:
    """All prompts of a call: the texts, then the files; if there are none, standard input.

    A file, and standard input, is one prompt: all of it but for the newline at its end, which
    editors and `echo` add.

    Args:
      texts: prompts as they are.
      files: paths; "-" is standard input.

    Raises:
      UserError: if there is no prompt, one is empty, or a file is unreadable or no UTF-8 text.
    """
    if not texts and not files:
        if sys.stdin is None or sys.stdin.isatty():
            raise UserError(
                "there is no prompt; give --prompt TEXT, --prompt_file FILE or --interactive, "
                "or pipe a text in"
            )
        files = [STDIN]
    if files.count(STDIN) > 1:
        raise UserError("--prompt_file - is given twice; standard input can be read only once")
    prompts = [*texts, *map(_read_whole, files)]
    for prompt in prompts:
        _check_not_empty(prompt)
        check_unicode(prompt)
    return prompts


def converse(answer: Callable[[int, str], None], tell: Callable[[UserError], None]) -> None:
    """Answers one line of standard input after another, until it ends.

    A mistake is told, and the next line read. Where a person types, Ctrl-C ends the answer that
    is being given, or, at the sign that asks for a line, all.

    Args:
      answer: takes the number of the line, counted from 0, and the line.
      tell: shows a mistake.
    """
    person = sys.stdin is not None and sys.stdin.isatty()
    for index in itertools.count():
        try:
            line = _read_line(person)
            _check_not_empty(line)
        except EOFError:
            return
        except UserError as error:
            tell(error)
            continue
        try:
            answer(index, line)
        except UserError as error:
            tell(error)
        except KeyboardInterrupt:
            if not person:
                raise


def _read_line(person: bool) -> str:
    """The next line of standard input; raises EOFError at its end, UserError if it is no text."""
    if not person:
        line = b"" if sys.stdin is None else sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        return _text(line, "the line")
    try:
        return _ask()
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)  # or what comes next would stand on the line of the sign
        raise


def _ask() -> str:
    """A line from a person; what asks for it goes to stderr where the output is piped."""
    if not sys.stdout.isatty():
        print(_SIGN, end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        return _text(line, "the line")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives `input` editing and a history
    try:
        return input(_SIGN)
    except UnicodeDecodeError as error:
        raise _not_utf8(error, "the line") from None


def _read_whole(file: str) -> str:
    if file != STDIN:
        return _checked(read_text(Path(file)), file)
    if sys.stdin is None:
        raise UserError("--prompt_file - cannot be read: standard input is closed")
    return _text(sys.stdin.buffer.read(), "standard input")


def _text(data: bytes, name: str) -> str:
    try:
        return _checked(data.decode("utf-8-sig"), name)
    except UnicodeDecodeError as error:
        raise _not_utf8(error, name) from None


def _checked(text: str, name: str) -> str:
    """A text without its last newline."""
    if "\0" in text:
        raise UserError(f"{name} is no text: it has a NUL byte; give text in UTF-8")
    return text.removesuffix("\r\n" if text.endswith("\r\n") else "\n")


def _not_utf8(error: UnicodeDecodeError, name: str) -> UserError:
    return UserError(
        f"{name} is not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset "
        f"{error.start}; convert it first, for example with iconv -t UTF-8"
    )


def _check_not_empty(prompt: str) -> None:
    if not prompt:
        raise UserError(
            "the prompt is empty; give some text, or <|endoftext|> with --allow_end_of_text "
            "for a text from nothing"
        )
