"""What the documents tell their readers to type works, and prints what they say."""

import concurrent.futures
import re

import documented_blocks
import documented_place
import pytest
from documented_blocks import DOCUMENTS, KINDS, NOT_RUN, ROOT, RUN, blocks, fences, given, note
from documented_commands import JOBS, run_document

BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
each_document = pytest.mark.parametrize("document", DOCUMENTS)


@pytest.fixture(scope="module")
def running(request):
    """Documents under way, by name: those of which a test was chosen, the longest first."""
    chosen = {item.callspec.params["block"].document for item in _of_this_module(request)}
    with (
        documented_place.prepared() as (template, folder),
        concurrent.futures.ThreadPoolExecutor(JOBS) as pool,
    ):
        longest_first = sorted(chosen, key=lambda name: -sum(len(b.runnable) for b in blocks(name)))
        yield {name: pool.submit(run_document, name, template, folder) for name in longest_first}


def _of_this_module(request):
    return [item for item in request.session.items if item.name.startswith("test_a_block_runs[")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.runnable], ids=lambda block: block.name
)
def test_a_block_runs(block, running):
    outcomes = {outcome.block: outcome for outcome in running[block.document].result()}
    outcome = outcomes[block]
    assert not outcome.failure, outcome.failure
    if not outcome.seconds:
        pytest.skip(f"needs {', '.join(outcome.missing)}")
    assert outcome.missing or len(outcome.seconds) == len(block.runnable)


def test_there_are_commands_to_run():
    documents = {block.document for block in BLOCKS if block.runnable}
    assert documents >= {"README.md", "docs/train.md", "docs/generate.md", "docs/from_pytorch.md"}


@each_document
def test_a_block_is_marked_as_what_it_is(document):
    typed = re.compile(
        r"(\$ |python |pip |pytest |make |scripts/\w+\.py [\w ]*--|from \w+ import |import \w+$)"
    )
    for line, language, contents, _ in fences(document):
        assert language in (*RUN, *NOT_RUN), f"{document}:{line} is of no known language"
        if language not in RUN:
            commands = [text for text in contents.splitlines() if typed.match(text)]
            assert not commands, f"{document}:{line} has commands; mark it sh, console or python"


@each_document
def test_a_comment_is_of_use(document):
    commented = {
        block.line: {n for c in block.commands for n in c.notes} for block in blocks(document)
    }
    previous = ""
    for line, language, _, notes in fences(document):
        for remark in notes:
            where = f"{document}:{line}: {remark}"
            if remark.kind == "shows":
                assert language == "console" or previous in RUN, where
            else:
                assert remark in commented[line], f"{where} is for none of the commands"
        previous = language


@each_document
def test_what_readers_have_is_a_run_or_shakespeare(document):
    for name in given(document):
        assert name.startswith("runs/") or name == "data/shakespeare", name


@pytest.mark.parametrize(
    "comment", ["not run", "not run:", "not runs: x", "run with --steps 2", "shows: x", "shown"]
)
def test_a_comment_that_says_nothing_is_refused(comment):
    with pytest.raises(ValueError, match=rf"x\.md:1: .* is no {KINDS[0]}"):
        note(comment, "x.md:1")


@pytest.fixture
def document(tmp_path, monkeypatch):
    """Writes a document; its text is given with ' for the fences' backticks."""

    def write(text):
        (tmp_path / "x.md").write_text(text.replace("'", "`"))
        return blocks("x.md")

    monkeypatch.setattr(documented_blocks, "ROOT", tmp_path)
    return write


def test_commands_are_read_with_their_comments(document):
    [first, second, third] = document(
        """
<!-- run with (b.py): --steps 2 A=1 -->
<!-- not run (pip): the network -->
'''sh
pip install x   # the package
python b.py --prompt "a # b" \\
    --more   # or less
python c.py > out
'''
<!-- shows -->
'''
step 1
'''
<!-- needs: no_such_module -->
'''python
x = 1
'''
'''console
$ python d.py \\
      --ids
1 2 3
$ python e.py
> typed
printed
'''
"""
    )
    assert [command.changed for command in first.runnable] == [
        'A=1 python b.py --prompt "a # b" --more --steps 2',
        "python c.py > out",
    ]
    assert [command.line for command in first.commands] == [5, 6, 8]
    assert first.commands[0].words("not run") == "the network"
    assert first.shown == ("step 1",)
    assert second.commands[0].missing == ["no_such_module"]
    assert [command.text for command in third.commands] == ["python d.py --ids", "python e.py"]
    assert [command.typed for command in third.commands] == ["", "typed\n"]


@pytest.mark.parametrize(
    ("shown", "printed", "missing"),
    [
        (["step 0  loss 10.7", "...", "done"], "note\nstep 12 loss 9.1e-05\n\ndone", None),
        (
            ["step 0/250  lr 6.67e-05  ... tokens/s  ETA ..."],
            "step 3/4 lr 1 1,24 tokens/s ETA",
            None,
        ),
        (
            ["┃ logits ┃ 1x4x50257 ┃ ok ┃", "└────┴──┘"],
            "┃ logits  ┃ 2x8x97   ┃ ok ┃\n└──┴────┘",
            None,
        ),
        (["step 0  loss 10.7"], "step 0  lost 10.7", "step 0  loss 10.7"),
        (["first", "second"], "second\nfirst", "second"),
        (["a", "a"], "a", "a"),
        (['{"text": "x", "n": 1}'], '{"text": "y", "n": 2}', None),
        (['{"text": "x", "n": 1}'], '{"text": "y"}', '{"text": "x", "n": 1}'),
    ],
)
def test_what_is_shown_must_come_in_order(shown, printed, missing):
    assert documented_blocks.not_shown(tuple(shown), printed) == missing


def test_a_command_that_fails_is_named(document, tmp_path):
    block, _ = document("'''sh\ntrue\necho before; false | true\n'''\n'''python\n1 / 0\n'''\n")
    folder = tmp_path / "folder"
    python = documented_place.write_python(folder / "template/bin")
    (folder / "environment.json").write_text(f'{{"PATH": "{python.parent}:/usr/bin:/bin"}}')
    shell, program = run_document("x.md", folder / "template", folder)
    assert shell.block == block
    assert shell.failure == "x.md:3: exit status 1\n$ echo before; false | true\nbefore\n"
    assert program.failure.startswith("x.md:6: exit status 1\n$ 1 / 0")
    assert "ZeroDivisionError" in program.failure


def test_a_command_that_hangs_is_ended(tmp_path, monkeypatch):
    (tmp_path / "environment.json").write_text('{"PATH": "/usr/bin:/bin"}')
    (tmp_path / "place").mkdir()
    monkeypatch.setattr(documented_place, "TIME_LIMIT", 0.2)
    code, output = documented_place.execute("echo begun; sleep 60", tmp_path / "place")
    assert (code, output) == (documented_place.TOO_LONG, "begun\n")


def test_the_documents_are_found():
    assert {"README.md", "CONTRIBUTING.md", "launch/README.md"} <= set(DOCUMENTS)
    assert all((ROOT / document).is_file() for document in DOCUMENTS)
