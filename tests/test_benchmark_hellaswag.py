"""The benchmark of HellaSwag: all score the same items, by turns, and tokens are counted right."""

import io
import json

import jax
import numpy as np
import pytest
from doors import Door
from rich.console import Console

from gpt2_jax.benchmarks import contestants
from gpt2_jax.benchmarks import hellaswag as module
from gpt2_jax.benchmarks.hellaswag import HellaSwagFigures, Measured, measure_hellaswag, padding
from gpt2_jax.benchmarks.hellaswag_report import LEGEND, padding_lines, speed_table
from gpt2_jax.benchmarks.hellaswag_scorers import PROTOCOL, TITLES
from gpt2_jax.benchmarks.model_files import weights_text
from gpt2_jax.config import GPT2Config
from gpt2_jax.evaluation.hellaswag import make_hellaswag, question
from gpt2_jax.evaluation.hellaswag_items import Item
from gpt2_jax.interop.export import export_model
from gpt2_jax.model import GPT2, init_params

CONFIG = GPT2Config(n_positions=64, n_embd=8, n_layer=1, n_head=2)
TEXT = "the dog reads a very good book and barks at it far away"
WORDS = TEXT.split()
ITEMS = [
    Item(
        "Dogs",
        " ".join(WORDS[: 3 + number]),
        "he",
        "",
        tuple(" ".join(WORDS[n : n + 2 + number]) for n in range(4)),
        number % 4,
        None,
    )
    for number in range(6)
]


class InProcess:
    """Stands for `Worker`: the same, in this process. Keeps each contestant apart."""

    def __init__(self, _threads: int) -> None:
        self._state = None

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._state = None

    def run(self, function, *args):
        module._scorer = self._state
        result = function(*args)
        self._state = module._scorer
        return result


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Worker", InProcess)
    monkeypatch.setattr(contestants, "SETTLE_SECONDS", 0)


@pytest.fixture
def model_dir(tmp_path):
    export_model(tmp_path / "model", init_params(CONFIG, jax.random.key(0)), CONFIG)
    return tmp_path / "model"


def test_tokens_are_counted() -> None:
    counted = padding(ITEMS, CONFIG.n_positions, 2)
    questions = [question(item, PROTOCOL) for item in ITEMS]
    texts = [len(context) + len(e) - 1 for context, endings in questions for e in endings]
    rows = [len(context) + sum(map(len, endings)) - 4 for context, endings in questions]
    assert counted.texts == sum(texts)
    assert counted.rows == sum(rows)
    assert counted.predictions == sum(len(e) for _, endings in questions for e in endings)
    # Pairs of rows, the longest first, as long as the longer one rounded up to 16.
    longer = sorted(rows, reverse=True)[::2]
    assert counted.computed == sum(2 * -(-length // 16) * 16 for length in longer)
    longer = sorted(texts, reverse=True)[::2]
    assert counted.computed_texts == sum(2 * -(-length // 16) * 16 for length in longer)
    assert counted.computed_predictions % 32 == 0
    assert counted.predictions <= counted.computed_predictions < counted.predictions + 6 * 16


@pytest.mark.usefixtures("in_process")
def test_ours_finds_the_losses(model_dir, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = {"ours": [], "torch": ["torch"], "harness": ["lm_eval"]}
    monkeypatch.setattr(module, "missing_packages", packages.__getitem__)
    told: list[str] = []
    figures = measure_hellaswag(
        list(packages),
        ITEMS,
        source=str(model_dir),
        model=None,
        dtype="float32",
        batch_sizes=[2, 3],
        rounds=2,
        threads=1,
        report=told.append,
    )
    assert list(figures.measured) == ["ours"]
    assert figures.left_out["harness"] == "not installed; pip install lm_eval"
    ours = figures.measured["ours"]
    params = init_params(CONFIG, jax.random.key(0))
    expected = make_hellaswag(GPT2(CONFIG), ITEMS, 4, protocol=PROTOCOL)(params).sums_NE
    np.testing.assert_allclose(ours.sums_NE, expected, atol=1e-4)
    assert ours.batch_size in (2, 3)
    assert (ours.device, len(ours.seconds)) == ("cpu", 2)
    assert told[-1] == "gpt2_jax in float32: round 2 of 2"


@pytest.mark.usefixtures("in_process")
def test_others_that_fail_are_left_out_and_ours_is_no_result(
    model_dir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str, _task: object) -> None:
        raise OSError(f"{name}\nfails")

    monkeypatch.setattr(module, "open_scorer", broken)
    monkeypatch.setattr(module, "missing_packages", lambda _: [])
    asked = {"source": str(model_dir), "model": None, "dtype": "float32", "batch_sizes": [1]}
    figures = measure_hellaswag(["torch", "harness"], ITEMS, **asked, rounds=1, threads=1)
    assert figures.left_out == {
        "torch": "OSError: torch fails",
        "harness": "OSError: harness fails",
    }
    with pytest.raises(OSError, match="ours"):
        measure_hellaswag(["ours", "torch"], ITEMS, **asked, rounds=1, threads=1)


def made_up_figures() -> HellaSwagFigures:
    sums_NE = np.full((5, 4), 100.0)
    return HellaSwagFigures(
        "bfloat16",
        {
            "ours": Measured("cpu", 16, sums_NE, [2.0, 1.0, 3.0]),
            "torch": Measured("cpu", None, sums_NE + 0.5, [2_000.0, 4.0, 3.0]),
            "harness": Measured("cpu", 4, sums_NE - 0.25, [5.0, 4.0, 6.0]),
        },
        {},
    )


def test_figures_are_medians() -> None:
    figures = made_up_figures()
    assert figures.measured["ours"].items_per_second == 2.5
    # Of the rounds' own: 1000, 4, 1 and 2.5, 4, 2.
    assert (figures.ratio("torch"), figures.ratio("harness")) == (4.0, 2.5)
    assert (figures.difference("torch"), figures.difference("harness")) == (0.5, 0.25)
    written = json.loads(json.dumps(figures.to_json()))
    assert written["contestants"]["harness"]["ours_is_faster_by"] == 2.5
    assert written["contestants"]["ours"]["seconds"] == [2.0, 1.0, 3.0]


def test_the_table_fits_a_terminal() -> None:
    console = Console(width=80, file=io.StringIO())
    console.print(speed_table(made_up_figures()))
    text = console.file.getvalue()
    assert "…" not in text
    row = next(line for line in text.splitlines() if TITLES["harness"] in line)
    assert row.split()[-6:] == ["cpu", "4", "1.00", "167.4", "2.50x", "2.5e-01"]
    lines = padding_lines(padding(ITEMS, 64, 2))
    assert len(lines) == 6
    assert max(map(len, [*LEGEND.splitlines(), *lines])) <= 80


@pytest.mark.parametrize(
    ("source", "model", "expected"),
    [
        (None, None, "gpt2 with random weights"),
        (None, "gpt2-xl", "gpt2-xl with random weights"),
        ("gpt2", None, "gpt2 with pretrained weights"),
        ("pretrained", None, "gpt2 with pretrained weights"),
        ("pretrained", "gpt2-xl", "gpt2-xl with pretrained weights"),
        ("runs/demo", None, "runs/demo"),
    ],
)
def test_the_weights_are_named(source: str | None, model: str | None, expected: str) -> None:
    assert weights_text(source, model) == expected


@pytest.fixture
def door(capsys: pytest.CaptureFixture, tmp_path, monkeypatch: pytest.MonkeyPatch) -> Door:
    monkeypatch.chdir(tmp_path)
    fields = ("activity_label", "ctx_a", "ctx_b", "endings", "label")
    lines = [json.dumps({name: getattr(item, name) for name in fields}) for item in ITEMS]
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    return Door(capsys)


@pytest.mark.usefixtures("in_process")
def test_the_benchmark_at_the_door(door: Door, model_dir, tmp_path) -> None:
    flags = ("--data", "items.jsonl", "--source", model_dir, "--contestants", "ours")
    sizes = ("--items", 3, "--batch", 2, "--rounds", 1, "--threads", 1)
    code, out, err = door("benchmark", "hellaswag", *flags, *sizes, "--output", "figures.json")
    assert (code, err) == (0, "")
    assert "items.jsonl, 6 items in batches of 4" in out
    assert "medians of 1 rounds of 3 items" in out
    written = json.loads((tmp_path / "figures.json").read_text())
    assert (written["items"], written["rounds"], written["threads"]) == (3, 1, 1)
    assert written["tokens"]["rows"] == padding(ITEMS, 1024, 4).rows
    (measured,) = written["measured"]
    assert len(measured["contestants"]["ours"]["seconds"]) == 1


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--items", 0), "items=0 must be a whole number of at least 1"),
        (("--batch", 0), "batch=0 must be"),
        (("--batch",), "--batch is empty"),
        (("--rounds", -1), "rounds=-1 must be"),
        (("--dtype", "float16"), "float16"),
        (("--dtype",), "--dtype is empty"),
        (("--contestants", "vllm"), "vllm"),
        (("--contestants",), "--contestants is empty"),
        (("--threads", 0), "threads=0 must be from 1 to"),
        (("--data", "nowhere.jsonl"), "cannot read nowhere.jsonl"),
        (("--config", "configs/demo.py"), "unknown flag --config"),
    ],
)
def test_nonsense_is_refused_at_once(door: Door, flags: tuple, complaint: str) -> None:
    assert complaint in door.refuses("benchmark", "hellaswag", "--data", "items.jsonl", *flags)
