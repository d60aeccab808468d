"""Runs the notebooks from top to bottom and keeps what they show.

    python notebooks/execute.py                     all of them, outputs written in place
    python notebooks/execute.py 1_inside_the_model  one
    python notebooks/execute.py --check             all of them, nothing written

prints the seconds each took; the exit status is 1 if one failed. Needs the extra "notebooks":
pip install -e ".[notebooks]".
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

try:
    import nbformat
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
except ModuleNotFoundError as error:
    print(f"{error.name} is missing; pip install -e '.[notebooks]'", file=sys.stderr)
    sys.exit(2)

FOLDER = Path(__file__).resolve().parent
TIMEOUT = 300
"""seconds that one cell may take"""


def execute(path: Path, timeout: int = TIMEOUT) -> nbformat.NotebookNode:
    """Runs a notebook in a kernel of its own, whose working directory is an empty one.

    Args:
      path: the notebook; the file stays as it is.
      timeout: seconds that one cell may take.

    Returns:
      The notebook with its new outputs, and nothing that differs from machine to machine but
      what the cells themselves print.

    Raises:
      CellExecutionError: if a cell fails.
      CellTimeoutError: if one takes too long.
      DeadKernelError: if the kernel ends, for want of memory perhaps.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory(prefix="gpt2_jax-notebook-") as directory:
        environment = {
            **os.environ,
            "IPYTHONDIR": directory,  # no start-up files, no history
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        }
        # Sockets in the folder instead of ports, to which others on the machine could listen.
        kernel = AsyncKernelManager(
            kernel_name="python3", transport="ipc", connection_file=f"{directory}/kernel.json"
        )
        NotebookClient(
            notebook,
            km=kernel,
            timeout=timeout,
            resources={"metadata": {"path": directory}},
            record_timing=False,
            coalesce_streams=True,
        ).execute(env=environment, cleanup_kc=True)
    return normalised(notebook)


def normalised(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with the least metadata, in place: versions and times are no content."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for number, cell in enumerate(notebook.cells, 1):
        cell.metadata = nbformat.from_dict({})
        cell.id = f"cell-{number}"
    nbformat.validate(notebook)
    return notebook


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Writes a notebook beside its file, then renames it."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    unfinished.replace(path)


def find(names: list[str]) -> list[Path]:
    """The notebooks of these names, with or without ending; all of them if none is given."""
    found = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}
    stems = [Path(name).stem for name in names] or list(found)
    for stem in stems:
        if stem not in found:
            print(f"there is no notebook {stem!r}; there are {', '.join(found)}", file=sys.stderr)
            sys.exit(2)
    return [found[stem] for stem in stems]


def main() -> int:
    """Runs the notebooks that the command line names."""
    parser = argparse.ArgumentParser(description="Runs notebooks from top to bottom.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="which; all without a name")
    parser.add_argument("--check", action="store_true", help="run them, and write nothing")
    flags = parser.parse_args()
    failed = 0
    for path in find(flags.names):
        start = time.perf_counter()
        try:
            notebook = execute(path)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            failed += 1
            print(f"{path.stem}  failed\n{error}", file=sys.stderr)
            continue
        if not flags.check:
            write(notebook, path)
        print(f"{path.stem}  {time.perf_counter() - start:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
