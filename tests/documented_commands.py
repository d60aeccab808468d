"""The commands of the documents, run as their readers type them.

    python tests/documented_commands.py --list           what is run, and why the rest is not
    python tests/documented_commands.py [DOCUMENT ...]   runs it, and prints how long it took

documented_blocks.py says which are run. The shell's commands of a document run one by one, in one
directory (documented_place.py), then its Python blocks as one program.
"""

import argparse
import concurrent.futures
import dataclasses
import re
import shlex
import sys
import time
from pathlib import Path

import documented_place
from documented_blocks import DOCUMENTS, Block, Command, blocks, given, not_shown

JOBS = 2
"""documents at a time: most of a small command is spent on one core"""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a block."""

    block: Block
    seconds: tuple[float, ...] = ()
    """of each command that was run"""
    missing: tuple[str, ...] = ()
    failure: str = ""


def run_document(document: str, template: Path, folder: Path) -> list[Outcome]:
    """Runs the blocks of a document in a new directory."""
    place = documented_place.copy(template, folder / document.replace("/", "-"), given(document))
    found = blocks(document)
    of_shell = [block for block in found if block.language != "python"]
    outcomes = [_run_block(block, place) for block in of_shell]
    return outcomes + _run_python([block for block in found if block not in of_shell], place)


def _run_block(block: Block, place: Path) -> Outcome:
    seconds: list[float] = []
    printed, failures = "", []
    missing = {name for command in block.runnable for name in command.missing}
    for command in block.runnable:
        if command.missing:
            continue
        start = time.perf_counter()
        code, output = documented_place.execute(command.changed, place, command.typed)
        seconds.append(time.perf_counter() - start)
        printed += output
        if code:
            failures.append(_told(f"{block.document}:{command.line}", command, code, output))
    line = not_shown(block.shown, printed) if seconds and not failures else None
    if line is not None:
        failures.append(f"{block.name}: no such line came:\n{line}\nbut:\n{printed[-4000:]}")
    return Outcome(block, tuple(seconds), tuple(sorted(missing)), "\n".join(failures))


def _run_python(found: list[Block], place: Path) -> list[Outcome]:
    """One program, whose lines have the numbers that they have in the document."""
    program: list[str] = []
    ran: list[Block] = []
    missing: tuple[str, ...] = ()
    for block in found:
        for command in block.runnable:
            missing += tuple(command.missing)
            if not missing:  # what comes after may need it, too
                program += [""] * (command.line - 1 - len(program)) + command.text.splitlines()
                ran.append(block)
    if not ran:
        return [Outcome(block, missing=missing) for block in found]
    document, start = ran[0].document, time.perf_counter()
    file = place / "python_blocks.txt"
    file.write_text("\n".join(program) + "\n", encoding="utf-8")
    run = f"exec(compile(open({file.name!r}).read(), {document!r}, 'exec'))"
    code, output = documented_place.execute(f"python -c {shlex.quote(run)}", place)
    seconds = time.perf_counter() - start
    lines = re.findall(rf'"{re.escape(document)}", line (\d+)', output)
    last = int(lines[-1]) if lines else ran[0].line
    at_fault = [block for block in ran if block.line <= last][-1]
    outcomes = []
    for block in found:
        failure = ""
        if code and block is at_fault:
            failure = _told(f"{document}:{last}", block.commands[0], code, output)
        of_block = (seconds * (block is ran[0]),) if block in ran else ()
        outcomes.append(Outcome(block, of_block, missing, failure))
    return outcomes


def _told(where: str, command: Command, code: int, output: str) -> str:
    status = "took too long" if code == documented_place.TOO_LONG else f"exit status {code}"
    return f"{where}: {status}\n$ {command.changed}\n{output[-4000:]}"


def main() -> int:
    """Lists the blocks or runs them."""
    parser = argparse.ArgumentParser(description="Runs the commands of the documents.")
    parser.add_argument("documents", nargs="*", metavar="DOCUMENT", help="all, if none is given")
    parser.add_argument("--list", action="store_true", help="tell what is run, and run nothing")
    flags = parser.parse_args()
    chosen = flags.documents or DOCUMENTS
    if flags.list:
        _list(chosen)
        return 0
    failed = False
    with (
        documented_place.prepared() as (template, folder),
        concurrent.futures.ThreadPoolExecutor(JOBS) as pool,
    ):
        running = {pool.submit(run_document, name, template, folder): name for name in chosen}
        for future in concurrent.futures.as_completed(running):
            outcomes = future.result()
            failed |= any(outcome.failure for outcome in outcomes)
            print(f"{running[future]}  {sum(sum(each.seconds) for each in outcomes):.0f} s")
            for outcome in outcomes:
                print(f"  {_summary(outcome)}", flush=True)
    return int(failed)


def _summary(outcome: Outcome) -> str:
    seconds = " + ".join(f"{second:.1f}" for second in outcome.seconds)
    text = f"{outcome.block.name}  {seconds} s" if seconds else f"{outcome.block.name}  not run"
    if outcome.missing:
        text += f", missing {' '.join(outcome.missing)}"
    return text + (f"\nFAILED {outcome.failure}" if outcome.failure else "")


def _list(documents: list[str]) -> None:
    counts = {"run": 0, "not run": 0}
    for document in documents:
        for block in blocks(document):
            for command in block.commands:
                reason = command.words("not run")
                counts["not run" if reason else "run"] += 1
                first = command.text.splitlines()[0] if command.text else ""
                print(f"{document}:{command.line}  {first}")
                print(f"    not run: {reason}" if reason else "    run", end="")
                for kind in ("run with", "needs"):
                    if command.words(kind) and not reason:
                        print(f", {kind} {command.words(kind)}", end="")
                print()
    print(f"{counts['run']} commands and Python blocks run, {counts['not run']} not")


if __name__ == "__main__":
    sys.exit(main())
