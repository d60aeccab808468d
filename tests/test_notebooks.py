"""The notebooks run from top to bottom, and what is committed is what they show."""

import base64
import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NEED_TORCH = {"2_parity_step_by_step": ("torch", "transformers")}

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def nbformat() -> types.ModuleType:
    return pytest.importorskip("nbformat", reason="needs nbformat")


@pytest.fixture(scope="module")
def door() -> types.ModuleType:
    """notebooks/execute.py."""
    for name in ("nbclient", "ipykernel"):
        pytest.importorskip(name, reason=f"needs {name}")
    spec = importlib.util.spec_from_file_location("execute", ROOT / "notebooks" / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kinds(cell) -> list[tuple[str, ...]]:
    """Of each output its type and the formats it has; none may be an error or a warning."""
    found = []
    for output in cell.outputs:
        assert output.output_type != "error", output.evalue
        assert output.get("name") != "stderr", output.text
        found.append((output.output_type, *sorted(output.get("data", ()))))
    return found


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_five_notebooks():
    assert [path.stem[0] for path in NOTEBOOKS] == list("12345")


def test_the_readme_names_each():
    text = (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\((\w+\.ipynb)\)", text) == [path.name for path in NOTEBOOKS]


@each_notebook
def test_a_notebook_was_run_from_top_to_bottom(path: Path, nbformat):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    shown = [kind for cell in cells for kind in kinds(cell)]
    assert any("image/png" in kind for kind in shown)


@each_notebook
def test_a_notebook_names_no_machine(path: Path):
    text = path.read_text(encoding="utf-8")
    for place in (str(ROOT), sys.prefix):
        assert place not in text
    assert not re.search(r"/(home|Users|tmp|root)/\w|site-packages|ipykernel_\d", text)


@each_notebook
def test_the_pictures_of_a_notebook_are_small(path: Path, nbformat):
    for cell in code_cells(nbformat.read(path, as_version=4)):
        for output in cell.outputs:
            assert len(base64.b64decode(output.get("data", {}).get("image/png", ""))) <= 60_000


@pytest.mark.slow
@each_notebook
def test_a_notebook_shows_what_is_committed(path: Path, nbformat, door):
    for name in NEED_TORCH.get(path.stem, ()):
        pytest.importorskip(name, reason=f"{path.stem} needs {name}")
    committed = nbformat.read(path, as_version=4)
    executed = door.execute(path)
    for old, new in zip(code_cells(committed), code_cells(executed), strict=True):
        assert kinds(old) == kinds(new), new.source
    assert executed.metadata == door.normalised(committed).metadata


def test_a_notebook_that_fails_is_named_and_nothing_is_written(
    tmp_path: Path, nbformat, door, monkeypatch, capsys
):
    path = tmp_path / "broken.ipynb"
    cells = [nbformat.v4.new_code_cell("1 + 1"), nbformat.v4.new_code_cell("assert False, 'no'")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    before = path.read_bytes()
    monkeypatch.setattr(door, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["execute.py"])
    assert door.main() == 1
    assert "broken  failed" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_a_notebook_that_runs_is_written(tmp_path: Path, nbformat, door, monkeypatch, capsys):
    """Unless it is only to be checked; what it prints in two pieces is one output."""
    path = tmp_path / "small.ipynb"
    source = "import sys\nprint(1)\nsys.stdout.flush()\nprint(2)"
    cells = [nbformat.v4.new_code_cell(source)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    before = path.read_bytes()
    monkeypatch.setattr(door, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["execute.py", "small", "--check"])
    assert door.main() == 0
    assert path.read_bytes() == before
    monkeypatch.setattr(sys, "argv", ["execute.py", "small.ipynb"])
    assert door.main() == 0
    [cell] = nbformat.read(path, as_version=4).cells
    assert (cell.id, cell.execution_count) == ("cell-1", 1)
    assert [output.text for output in cell.outputs] == ["1\n2\n"]
    assert re.fullmatch(r"(small  \d+ s\n){2}", capsys.readouterr().out)


def test_an_unknown_name_is_answered_with_the_known_ones(door, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["execute.py", "missing"])
    with pytest.raises(SystemExit) as caught:
        door.main()
    assert caught.value.code == 2
    assert (
        "there is no notebook 'missing'; there are 1_inside_the_model, " in capsys.readouterr().err
    )
