"""scripts/prepare_fineweb.py at its door: text, rows, mistakes, and a run that is killed."""

import io
import json
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt2_jax.data.corpus import open_corpus
from gpt2_jax.data.shards import read_shards
from gpt2_jax.tokenizer import END_OF_TEXT_ID, encode

SCRIPT = Path(__file__).parents[1] / "scripts" / "prepare_fineweb.py"
NO_DATASETS = "rows are read by Hugging Face datasets, an optional dependency"


@pytest.fixture
def prepare(capsys, tmp_path, monkeypatch):
    """Runs the script in this process: exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, flags)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return stop.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def refuses(prepare, tmp_path):
    """Expects exit status 2 and one line on stderr alone, and nothing written; gives the line."""

    def run(*flags):
        before = files_below(tmp_path)
        code, out, err = prepare(*flags)
        assert (code, out) == (2, ""), err
        assert re.fullmatch(r"error: [^\n]*\n", err)
        assert files_below(tmp_path) == before
        return err

    return run


def files_below(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def contents(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def tokens_in(directory):
    shards = [*read_shards(directory, "val", 50257), *read_shards(directory, "train", 50257)]
    return np.concatenate(shards)


def tokens_of(texts):
    return np.concatenate([np.append(np.uint16(END_OF_TEXT_ID), encode(text)) for text in texts])


def test_text_files_become_shards(prepare, tmp_path):
    (tmp_path / "text.txt").write_text("one two three " * 100)
    flags = ("--dataset", "text.txt", "--output", "data/out", "--shard_tokens", 120)
    code, out, err = prepare(*flags, "--processes", 1)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == [
        "val_000000.npy",
        "train_000001.npy",
        "train_000002.npy",
    ]
    assert all(re.search(r"  \d+ tokens  [\d,]+ tokens/s$", line) for line in lines[:3])
    assert lines[3] == "302 tokens in data/out: 182 for training, 120 for validation"
    description = json.loads((tmp_path / "data/out/dataset.json").read_text())
    assert description["tokens"] == {"train": 182, "val": 120}
    assert prepare(*flags) == (0, lines[3] + "\n", "")


def rows(texts, kind):
    """A file of rows as bytes, with an absent text at the end."""
    if kind == ".jsonl":
        lines = [json.dumps({"n": 1, "story": text}) for text in texts]
        return "\n".join([*lines, '{"n": 2, "story": null}', ""]).encode()
    pyarrow = pytest.importorskip("pyarrow", reason=NO_DATASETS)
    parquet = pytest.importorskip("pyarrow.parquet", reason=NO_DATASETS)
    table = pyarrow.table({"n": [1] * (len(texts) + 1), "story": [*texts, None]})
    data = io.BytesIO()
    parquet.write_table(table, data, row_group_size=7)
    return data.getvalue()


@pytest.mark.parametrize("kind", [".parquet", ".jsonl"])
def test_rows_are_documents(prepare, tmp_path, kind):
    pytest.importorskip("datasets", reason=NO_DATASETS)
    texts = [f"Row {n} tells {'a lot ' * (n % 4)}." for n in range(40)]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / f"a{kind}").write_bytes(rows(texts[:25], kind))
    (tmp_path / "rows" / f"b{kind}").write_bytes(rows(texts[25:], kind))
    flags = ("--dataset", "rows", "--text_column", "story", "--shard_tokens", 100)
    code, _, err = prepare(*flags, "--processes", 1, "--output", "out", "--limit_tokens", 260)
    assert (code, err) == (0, "")
    expected = tokens_of([*texts[:25], "", *texts[25:], ""])[:260]
    np.testing.assert_array_equal(tokens_in(tmp_path / "out"), expected)
    rows_from = open_corpus("rows", text_column="story").documents
    assert list(rows_from(20)) == [(text, True) for text in [*texts[20:25], "", *texts[25:], ""]]
    assert list(rows_from(40)) == [(texts[39], True), ("", True)]
    assert list(rows_from(42)) == []


@pytest.mark.parametrize(
    ("column", "problem"),
    [
        ("text", "rows.jsonl has no column 'text' but n, story; choose with --text_column"),
        ("n", "column 'n' of rows.jsonl holds int, not text; choose another of n, story"),
    ],
)
def test_a_column_without_text_is_refused(refuses, tmp_path, column, problem):
    pytest.importorskip("datasets", reason=NO_DATASETS)
    (tmp_path / "rows.jsonl").write_bytes(rows(["one"], ".jsonl"))
    assert problem in refuses("--dataset", "rows.jsonl", "--text_column", column)


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a.jsonl", b'{"text": 1', "a.jsonl cannot be read (JSON parse error"),
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.parquet", b"PAR1 and no more", "a.parquet cannot be read (Parquet magic bytes"),
    ],
)
def test_damaged_rows_are_refused(refuses, tmp_path, name, data, problem):
    pytest.importorskip("datasets", reason=NO_DATASETS)
    (tmp_path / name).write_bytes(data)
    assert problem in refuses("--dataset", name)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--shard_tokens", "0"], "shard_tokens=0 must be at least 1"),
        (["--limit_tokens", "0"], "limit_tokens=0 must be at least 1"),
        (["--processes", "0"], "processes=0 must be at least 1"),
        (["--limit_tokens", "9", "--shard_tokens", "9"], "must be more than shard_tokens=9"),
        (["--dataset", "text.txt"], "the text is 4 tokens, and the first shard, of 100,000,000"),
        (["--dataset", "text.txt", "--output", "text.txt"], "text.txt exists and is not a dataset"),
        (["--dataset", "empty.txt"], "the text is empty"),
        (["--dataset", "./nowhere"], "./nowhere does not exist"),
        (["--dataset", "text.txt", "--name", "x"], "text.txt is local"),
        (["--pretokenized", "a/b", "--name", "x"], "--name is for text to tokenize"),
        (["--pretokenized", "a/b", "--processes", "2"], "--processes is for text to tokenize"),
        (["--procesess", "2"], "did you mean --processes?"),
    ],
)
def test_what_cannot_be_done_is_refused(refuses, tmp_path, flags, problem):
    (tmp_path / "text.txt").write_text("one two three")
    (tmp_path / "empty.txt").touch()
    assert problem in refuses(*flags)


def test_without_the_datasets_package_rows_are_refused(refuses, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_bytes(rows(["one"], ".jsonl"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets, or give text files" in refuses("--dataset", "rows.jsonl")


def test_a_killed_run_goes_on_to_the_same_bytes(prepare, tmp_path):
    story = "".join(
        f"Chapter {n}. It was a dark and stormy night, {n} of them.\n" for n in range(9)
    )
    (tmp_path / "long.txt").write_text(story * 10_000)
    flags = ("--dataset", "long.txt", "--shard_tokens", "20000")
    assert prepare(*flags, "--processes", 1, "--output", "at_once")[0] == 0

    output = ("--output", "killed", "--processes", "2")
    command = [sys.executable, str(SCRIPT), *flags, *output]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(3):
            assert "tokens/s" in process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        # The tokenizer processes share the pipe: its end shows that none of them stays behind.
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    partial = contents(tmp_path / "killed.partial")
    kept = [shard["file"] for shard in json.loads(partial["dataset.json"])["shards"]]
    assert len(kept) >= 3

    code, out, _ = prepare(*flags, "--processes", 1, "--output", "killed")
    assert code == 0
    assert not any(name in out for name in kept)
    assert contents(tmp_path / "killed") == contents(tmp_path / "at_once")
    assert not (tmp_path / "killed.partial").exists()
