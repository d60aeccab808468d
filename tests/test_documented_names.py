"""Flags and files that the documents name in passing are there."""

import re
import runpy

import pytest
from documented_blocks import DOCUMENTS, ROOT
from doors import SCRIPTS, Door
from markdown_it import MarkdownIt

FLAG = re.compile(r"(?<![\w-])--[a-z][\w.]*[\w*]")
FILE = re.compile(
    r"(?<![\w/])(?:scripts|tests|parity|configs|gpt2_jax|launch|docs|notebooks|\.ci|\.github)"
    r"/[\w./*-]*\w\.\w+"
)
OF_OTHERS = {
    "--gpt2": "parity/conftest.py",
    "--list": "tests/documented_commands.py",
    "--nproc_per_node": "torchrun",
    "--signal": "sbatch",
    "--xla_cpu_experimental_ynn_fusion_type": "XLA",
    "--xla_cpu_use_onednn": "XLA",
    "--xla_cpu_use_xnnpack": "XLA",
    "--xla_disable_hlo_passes": "XLA",
    "--xla_gpu_deterministic_ops": "XLA",
}
OVER_CONFIG = ("train", "benchmark loop", "benchmark memory")
"""scripts whose flags are their own and every setting of a config"""

each_document = pytest.mark.parametrize("document", DOCUMENTS)


def code_in_text(document):
    tokens = MarkdownIt("commonmark").enable("table").parse((ROOT / document).read_text())
    inline = [child for token in tokens for child in token.children or []]
    return [child.content for child in inline if child.type == "code_inline"]


_flags: dict[str, set[str]] = {}


@pytest.fixture
def flags_of(capsys, monkeypatch):
    """The flags of each script, as --help lists them; asked once."""
    if not _flags:
        monkeypatch.chdir(ROOT)
        measurements = runpy.run_path(str(SCRIPTS / "benchmark.py"))["MEASUREMENTS"]
        doors = [path.stem for path in SCRIPTS.glob("*.py") if path.stem != "benchmark"]
        for name in (*doors, *(f"benchmark {what}" for what in measurements)):
            config = ("--config", "configs/demo.py") if name in OVER_CONFIG else ()
            script, *what = name.split()
            code, out, err = Door(capsys)(script, *what, *config, "--help")
            assert (code, err) == (0, ""), name
            _flags.setdefault(script, set()).update(FLAG.findall(out))
    return _flags


@each_document
def test_a_flag_in_the_text_is_one_of_the_scripts(document, flags_of):
    every = set().union(*flags_of.values())
    for code in code_in_text(document):
        named = re.search(r"(?:scripts/|^)(\w+)\.py\b", code)
        known = flags_of.get(named[1], every) if named else every
        for flag in FLAG.findall(code):
            start = flag.removesuffix("*")
            is_there = any(one.startswith(start) for one in known) if "*" in flag else flag in known
            assert is_there or flag in OF_OTHERS or flag == "--model.NAME", f"{document}: `{code}`"


@each_document
def test_a_file_in_the_text_is_there(document):
    for code in code_in_text(document):
        for name in FILE.findall(code):
            assert list(ROOT.glob(name)), f"{document}: `{code}`"
