"""The blocks of code in the documents, and what comments say about them.

Every block marked sh, console or python is run (documented_commands.py). HTML comments directly
before it say what is different:

    <!-- not run: REASON -->
    <!-- run with: --steps 2 -->     words that are added; NAME=VALUE goes to the environment
    <!-- needs: torch GPT2_JAX_SHARED -->     left out where a module or a variable is missing
    <!-- shows -->     before a block of output: the block above it prints such lines

`<!-- run with (train.py$): ... -->` is for the commands in which that regular expression is
found, `<!-- shows (loss) -->` for such lines. `<!-- given: runs/shakespeare -->` names what the
readers of a document have already.

In what is shown all numbers are alike, `...` is anything, objects of JSON need only have the same
fields, and other lines may stand between.
"""

import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "launch/*.md", "docs/*.md")
    for path in sorted(ROOT.glob(pattern))
]
RUN = ("sh", "console", "python")
NOT_RUN = ("", "json")
KINDS = ("not run", "run with", "needs", "shows", "given")

_COMMENT = re.compile(r"<!--\s*(.*?)\s*-->", re.DOTALL)
_NOTE = re.compile(r"([a-z ]+?)\s*(?:\((.+?)\))?(?:: *(.+))?", re.DOTALL)
_UNCOMMENTED = re.compile(r"""(?:[^\s"'#]|"[^"]*"|'[^']*'|(?<=\S)#|\s(?!\s*(?:#|$)))*""")
_NUMBER = re.compile(r"[-+]?\d[\d,.:]*(?:e[-+]?\d+)?")


@dataclasses.dataclass(frozen=True)
class Note:
    """One comment."""

    kind: str
    pattern: str = ""
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Command:
    """A line of a block with its continuations, or all Python of a block."""

    line: int
    text: str
    notes: tuple[Note, ...] = ()
    typed: str = ""
    """what goes to its stdin"""

    def words(self, kind: str) -> str:
        """What the comments of a kind say of this command, "" if there is none."""
        return " ".join(note.text for note in self.notes if note.kind == kind)

    @property
    def missing(self) -> list[str]:
        """Modules and variables that it needs and that are not there."""
        needed = self.words("needs").split()
        return [name for name in needed if not _is_there(name)]

    @property
    def changed(self) -> str:
        """The command with the words that are added to it."""
        words = shlex.split(self.words("run with"))
        settings = [word for word in words if re.match(r"[A-Z_]+=", word)]
        flags = [word for word in words if word not in settings]
        return " ".join([*map(_quoted, settings), self.text, *map(_quoted, flags)])


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code that is marked as one of `RUN`."""

    document: str
    line: int
    language: str
    commands: tuple[Command, ...]
    shown: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Where it is."""
        return f"{self.document}:{self.line}"

    @property
    def runnable(self) -> list[Command]:
        """Commands that no comment excludes."""
        return [command for command in self.commands if not command.words("not run")]


def _is_there(name: str) -> bool:
    """Whether a module can be imported or, in capitals, an environment variable is set."""
    if name.isupper():
        return bool(os.environ.get(name))
    return importlib.util.find_spec(name) is not None


def _quoted(word: str) -> str:
    """A setting's value must not be quoted together with its name."""
    name, equals, value = word.partition("=")
    return f"{name}={shlex.quote(value)}" if equals else shlex.quote(word)


def fences(document: str) -> list[tuple[int, str, str, list[Note]]]:
    """Line, language, contents and comments of each fenced block."""
    text = (ROOT / document).read_text(encoding="utf-8")
    found, comments = [], []
    for token in MarkdownIt("commonmark").parse(text):
        if token.type == "html_block":
            comments += _COMMENT.findall(token.content)
            continue
        if token.type == "fence":
            notes = [note(comment, f"{document}:{token.map[0] + 1}") for comment in comments]
            found.append((token.map[0] + 1, token.info.strip(), token.content, notes))
        comments = []
    return found


def note(comment: str, where: str) -> Note:
    """Reads a comment.

    Raises:
      ValueError: if it is none of the kinds that the module's docstring has.
    """
    match = _NOTE.fullmatch(comment)
    if not match or match[1] not in KINDS or (match[1] == "shows") == bool(match[3]):
        raise ValueError(f"{where}: <!-- {comment} --> is no {', '.join(KINDS)}")
    return Note(match[1], match[2] or "", " ".join((match[3] or "").split()))


def given(document: str) -> list[str]:
    """What the readers of a document have already."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return " ".join(re.findall(r"^<!-- given: (.*?) -->", text, re.MULTILINE)).split()


def blocks(document: str) -> list[Block]:
    """The blocks that are run or say why not."""
    found: list[Block] = []
    for line, language, contents, notes in fences(document):
        shows = [note.pattern for note in notes if note.kind == "shows"]
        if language not in RUN:
            if shows and found:
                lines = tuple(_found(shows[0], contents.splitlines()))
                found[-1] = dataclasses.replace(found[-1], shown=found[-1].shown + lines)
            continue
        of_commands = tuple(n for n in notes if n.kind != "shows")
        if language == "python":
            commands = (Command(line + 1, contents, of_commands),)
        else:
            commands = tuple(_commands(contents, line + 1, language, of_commands))
        shown = tuple(_found(shows[0], _output(contents))) if shows else ()
        found.append(Block(document, line, language, commands, shown))
    return found


def _commands(
    contents: str, first: int, language: str, notes: tuple[Note, ...]
) -> Iterator[Command]:
    """A shell's commands; in a console's session they follow $, and what is typed then >."""
    lines = contents.splitlines()
    number = 0
    while number < len(lines):
        start = number
        while lines[number].endswith("\\"):
            number += 1
        joined = " ".join(part.rstrip("\\").strip() for part in lines[start : number + 1])
        number += 1
        if language == "console":
            if not joined.startswith("$ "):
                continue
            joined = joined[2:]
        text = _UNCOMMENTED.match(joined)[0]
        if text:
            chosen = tuple(note for note in notes if re.search(note.pattern, text))
            session = itertools.takewhile(lambda line: not line.startswith("$ "), lines[number:])
            typed = "".join(f"{line[2:]}\n" for line in session if line.startswith("> "))
            yield Command(first + start, text, chosen, typed if language == "console" else "")


def _found(pattern: str, lines: Iterable[str]) -> Iterator[str]:
    return (line for line in lines if re.search(pattern, line))


def _output(contents: str) -> Iterator[str]:
    """A console's session without its commands."""
    continued = False
    for line in contents.splitlines():
        if not continued and not line.startswith("$ "):
            yield line
        continued = (continued or line.startswith("$ ")) and line.endswith("\\")


def not_shown(shown: tuple[str, ...], output: str) -> str | None:
    """The first line that should have been printed, after those before it; None if all were."""
    lines = iter(output.replace("\r", "\n").splitlines())
    for line in shown:
        if line.strip() not in ("", "...") and not any(_alike(line, other) for other in lines):
            return line
    return None


def _alike(line: str, other: str) -> bool:
    """Whether a line was printed as shown; objects of JSON need only have the same fields."""
    if line.startswith("{") and other.startswith("{"):
        return json.loads(line).keys() == json.loads(other).keys()
    return _pattern(line).search(other) is not None


@functools.cache
def _pattern(line: str) -> re.Pattern[str]:
    """Matches a line but for its numbers, the width of its columns and what `...` stands for."""
    parts = []
    for word in re.sub(r"([─━])\1+", r"\1", line).split():
        pieces = [re.escape(piece) for piece in _NUMBER.split(word)]
        parts.append(_NUMBER.pattern.join(pieces).replace(r"\.\.\.", ".*"))
    together = r"\s*".join(parts)
    return re.compile(re.sub("([─━])", r"\1+", together))
