"""What every script does at its door: read typed flags, and tell mistakes in one line."""

import argparse
import contextlib
import difflib
import errno
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from gpt2_jax.errors import UserError

Flags = TypeVar("Flags")


def run(main: Callable[[], int | None]) -> None:
    """Runs a script's main function and exits with its status.

    A `UserError` is printed on one line of stderr and exits with 2, a full disk too; an interrupt
    exits with 130, a reader that closed the pipe with 141. Anything else is a bug and keeps its
    traceback.
    """
    try:
        status = main() or 0
        sys.stdout.flush()
    except UserError as error:
        print_error(error)
        status = 2
        _leave_the_others(status)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        _drop_output()
        status = 141
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = error.filename or "the output"
        print_error(UserError(f"cannot write {where}: {error.strerror}; make room and try again"))
        status = 2
        _drop_output()
        _leave_the_others(status)
    sys.exit(status)


def _drop_output() -> None:
    """Sends stdout nowhere if it takes nothing: Python flushes it again on its way out."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_error(error: UserError) -> None:
    """Tells a mistake on one line of stderr."""
    print("error:", " ".join(str(error).split()), file=sys.stderr)


def parse_flags(flags_type: type[Flags], default: Flags | None = None) -> Flags:
    """Reads the command line into a frozen dataclass; `--help` prints the flags and exits 0.

    Args:
      flags_type: dataclass whose fields are the flags, nested ones dotted (`--data.path`).
      default: values for flags not given; None means the fields' own defaults.

    Raises:
      UserError: for an unknown flag (the nearest known one is suggested) or a bad value.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            flags, unknown = _parse(flags_type, default, sys.argv[1:])
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_first_sentence(complaint.getvalue())) from None
    if unknown:
        raise UserError(_unknown_flag(unknown[0], _known_flags(flags_type, default)))
    return flags


def parse_flags_over_config(flags_type: type[Flags], load: Callable[[Path], Any]) -> Flags:
    """Reads flags whose defaults are in the file that --config names.

    Args:
      flags_type: dataclass that begins with `config` and `settings`; the rest has defaults.
      load: reads the file into `settings`.

    Raises:
      UserError: as `parse_flags` and `load` do, and if --config is missing.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config", type=Path)
    try:
        config = first.parse_known_args()[0].config
    except argparse.ArgumentError as error:
        raise UserError(f"{error}, such as configs/demo.py") from None
    if config is not None:
        return parse_flags(flags_type, flags_type(config=config, settings=load(config)))  # type: ignore[call-arg]
    if {"-h", "--help"}.isdisjoint(sys.argv):
        raise UserError("--config is missing; give a file, such as --config configs/demo.py")
    return parse_flags(flags_type)


def given_flags() -> set[str]:
    """Names of the flags on the command line, which may give a flag its default value."""
    names = (arg.split("=")[0] for arg in sys.argv[1:] if arg.startswith("--"))
    return {name.removeprefix("--").replace("-", "_") for name in names}


def check_given_once(flag: str, paths: Sequence[Path]) -> None:
    """Raises UserError for a path that is given twice, under whatever name."""
    places = [path.resolve() for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise UserError(f"--{flag} {path} is given twice; give each once")


def check_writable_place(file: Path, *, read: Iterable[Path] = ()) -> None:
    """Raises UserError if a file could not be written, or would take the place of what is read.

    Args:
      file: what is to be written.
      read: files that the same call reads.
    """
    folder = file.absolute().parent
    if file.is_dir():
        raise UserError(f"cannot write {file}: it is a folder; give a file")
    if not folder.is_dir():
        raise UserError(f"cannot write {file}: its folder does not exist; make it first")
    if file.exists() and not file.is_file():
        raise UserError(f"cannot write {file}: it is no ordinary file; give another")
    if file.exists() and any(path.exists() and path.samefile(file) for path in read):
        raise UserError(f"cannot write {file}: it is what is read; give another")
    try:
        # Files are written beside, under a longer name.
        with contextlib.suppress(FileNotFoundError):
            file.with_name(f".{file.name}").lstat()
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write {file}: {error.strerror}; give a file in a folder that can be written"
        ) from None


def _parse(
    flags_type: type[Flags], default: Flags | None, args: list[str]
) -> tuple[Flags, list[str]]:
    return tyro.cli(
        flags_type,
        args=args,
        default=tyro.MISSING_NONPROP if default is None else default,
        return_unknown_args=True,
        use_underscores=True,
    )


def _leave_the_others(status: int) -> None:
    """Ends one of several processes at once; an ordinary exit waits minutes for the others."""
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        sys.stderr.flush()
        os._exit(status)


def keep_compiled_programs() -> None:
    """Lets JAX keep what it compiles on disk, so that the next start need not compile again.

    JAX_COMPILATION_CACHE_DIR names another folder than ~/.cache/gpt2_jax, and
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS another time from which on keeping is worth it.
    """
    import jax

    # JAX by itself keeps what took a second; many smaller programs take as long at every start.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(cache / "gpt2_jax"))


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like a misspelt one, whole or by its last dotted part; None if far."""

    def similarity(candidate: str) -> float:
        parts = (name, candidate), (name.split(".")[-1], candidate.split(".")[-1])
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in parts)

    best = max(known, key=similarity, default=None)
    return best if best is not None and similarity(best) >= 0.6 else None


def _known_flags(flags_type: type[Flags], default: Flags | None) -> list[str]:
    """Every flag that `--help` lists, without its dashes."""
    help_text = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(help_text):
        _parse(flags_type, default, ["--help"])
    return re.findall(r"--([a-z][\w.]*)", help_text.getvalue())


def _unknown_flag(flag: str, known: Iterable[str]) -> str:
    if not flag.startswith("-"):
        return f"unexpected argument {flag!r}; every value needs its --flag, see --help"
    name = flag.split("=")[0]
    near = closest(name.lstrip("-").replace("-", "_"), known)
    suggestion = f"did you mean --{near}?" if near else "--help lists every flag"
    return f"unknown flag {name}; {suggestion}"


def _first_sentence(box: str) -> str:
    """The message in tyro's framed complaint, without frame, colours and help text."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    rows = [line.strip("│|╭╮╰╯─ ") for line in plain.splitlines()]
    message: list[str] = []
    for row in rows[1:]:
        if not row:
            break
        message.append(row)
    return " ".join(message).rstrip(".") + "; --help lists every flag with its values"
