"""A base beside adapters: figures that follow from the losses, pages that show what they say."""

import dataclasses
import json
import math
import re

import jax
import numpy as np
import pytest
from rich.console import Console

from gpt2_jax.comparison.held_out import (
    HeldOut,
    score_held_out,
    windows_of_dataset,
    windows_of_text,
)
from gpt2_jax.comparison.page import comparison_page, level
from gpt2_jax.comparison.side_by_side import Comparison, Continuation, continue_prompts, names_of
from gpt2_jax.comparison.tables import changes_table, readable, tables, to_json
from gpt2_jax.errors import UserError
from gpt2_jax.evaluation.losses import token_losses
from gpt2_jax.generation.decode import generate
from gpt2_jax.generation.sampling import Sampling
from gpt2_jax.generation.text_stream import Notation
from gpt2_jax.tokenizer import encode
from gpt2_jax.web_page import plain

IDS = Notation(ids=True)


@pytest.fixture(scope="module")
def models(shallow_params):
    """A base, itself again, and one that differs."""
    other = jax.tree.map(lambda leaf: 1.1 * leaf, shallow_params)
    return [shallow_params, shallow_params, other]


@pytest.fixture(scope="module")
def text(shallow_config):
    return np.random.default_rng(2).integers(0, shallow_config.vocab_size, 70)


@pytest.fixture(scope="module")
def held_out(models, shallow_config, text):
    windows = windows_of_text(text, shallow_config, 10)
    return score_held_out(models, shallow_config, "held out", windows, 5)


@pytest.fixture(scope="module")
def continuations(models, shallow_config):
    return continue_prompts(
        models,
        shallow_config,
        [[5, 6, 7], [8]],
        num_samples=2,
        max_new_tokens=4,
        sampling=Sampling(1.0, 50),
        seed=3,
        precision="f32",
    )


def test_windows_follow_one_another_and_are_limited(held_out, text):
    np.testing.assert_array_equal(held_out.windows_NT[:, 0], text[:50:10])
    np.testing.assert_array_equal(held_out.windows_NT[:, 1:].flatten(), text[1:51])
    assert held_out.losses_MNT.shape == (3, 5, 10)


def test_a_model_beside_itself_differs_by_nothing(held_out):
    base, same, other = held_out.summaries(["base", "same", "other"])
    assert same == base._replace(model="same")
    assert (same.difference, same.improved, same.worsened) == (0, 0, 0)
    assert held_out.largest_changes(1, 10, IDS) == ([], [])
    assert other.improved + other.worsened == 1
    assert other.difference == pytest.approx(other.loss - base.loss, abs=1e-6)
    assert other.perplexity == pytest.approx(math.exp(other.loss))


def test_the_largest_changes_come_first_with_what_stood_before_them(held_out):
    gained, lost = held_out.largest_changes(2, 4, IDS)
    differences_NT = held_out.losses_MNT[2] - held_out.losses_MNT[0]
    ordered = np.sort(differences_NT, axis=None)
    assert [change.token.difference(2) for change in gained] == pytest.approx(ordered[:4])
    assert [change.token.difference(2) for change in lost] == pytest.approx(ordered[:-5:-1])
    window, place = np.unravel_index(differences_NT.argmin(), differences_NT.shape)
    ids = held_out.windows_NT[window]
    assert gained[0].token.id == ids[place + 1]
    assert gained[0].context == "".join(f"<{token}>" for token in ids[: place + 1])


def test_a_passage_joins_windows_that_follow_one_another(held_out, text):
    first, tokens = held_out.passage(35, IDS)
    assert first == f"<{text[0]}>"
    assert [token.id for token in tokens] == text[1:31].tolist()
    assert tokens[11].losses == tuple(held_out.losses_MNT[:, 1, 1].tolist())
    assert len(held_out.passage(3, IDS)[1]) == 10
    shuffled = dataclasses.replace(held_out, windows_NT=held_out.windows_NT[::-1])
    assert len(shuffled.passage(35, IDS)[1]) == 10


def test_texts_are_those_of_generation_by_the_same_draws(models, shallow_config, continuations):
    order = [(one.prompt_index, one.sample_index, one.model) for one in continuations]
    assert order == [(p, s, m) for p in range(2) for s in range(2) for m in range(3)]
    prompts = [[5, 6, 7], [5, 6, 7], [8], [8]]
    for model in (0, 2):
        expected = generate(
            models[model],
            shallow_config,
            prompts,
            max_new_tokens=4,
            sampling=Sampling(1.0, 50),
            seed=3,
        )
        assert [list(one.new) for one in continuations if one.model == model] == expected
    assert [one.new for one in continuations[::3]] == [one.new for one in continuations[1::3]]


def test_every_model_scores_every_text_alone(models, shallow_config, continuations):
    for one in (continuations[2], continuations[-1]):
        whole_1T = np.array([[*one.prompt, *one.new]])
        for model, params in enumerate(models):
            expected_1T = token_losses(params, shallow_config, whole_1T)
            np.testing.assert_allclose(
                one.losses_MT[model][None], expected_1T, rtol=1e-5, atol=1e-5
            )
        tokens = one.tokens(IDS)
        assert [token.id for token in tokens] == list(one.new)
        assert tokens[0].losses[2] == one.losses_MT[2, len(one.prompt) - 1]


def test_the_length_of_windows_fits_model_and_text(shallow_config, text):
    assert windows_of_text(text, shallow_config, None).sequence_length == 32
    short = windows_of_text(text[:2], shallow_config, None)
    assert (len(short), short.sequence_length) == (1, 1)
    for tokens, length, rule in (
        (text[:1], None, "has 1 token"),
        (text[:0], None, "has 0 token"),
        (text, 33, "sequence_length=33 is more than the model's context of 32"),
        (np.array([0, 2**32]), None, "token 4294967296 of the held-out text is outside"),
    ):
        with pytest.raises(UserError, match=rule):
            windows_of_text(tokens, shallow_config, length)
    too_long = windows_of_text(text[:5], shallow_config, 20)
    with pytest.raises(UserError, match="x is shorter than one window of 21 tokens"):
        score_held_out([], shallow_config, "x", too_long, 1)


def test_a_dataset_gives_its_validation_split(shallow_config, tmp_path):
    for split, tokens in (("train", np.arange(90)), ("val", np.arange(20))):
        np.save(tmp_path / f"{split}_000000.npy", tokens.astype(np.uint16))
    windows = windows_of_dataset(str(tmp_path), shallow_config, None)
    assert (len(windows), windows[0].tolist()) == (1, list(range(20)))
    assert len(windows_of_dataset(str(tmp_path), shallow_config, 5)) == 3


def test_names_tell_adapters_apart(tmp_path):
    a, b, base = tmp_path / "x/one", tmp_path / "y/one", tmp_path / "base"
    assert names_of([a]) == ("base", "one")
    assert names_of([a, b]) == ("base", str(a), str(b))
    assert names_of([base]) == ("base", str(base))


@pytest.mark.parametrize(
    ("difference", "name"),
    [
        (0.0, "same"),
        (-0.049, "same"),
        (-0.05, "better-1"),
        (0.3, "worse-2"),
        (-7.0, "better-3"),
        (math.nan, "worse-3"),
        (math.inf, "worse-3"),
    ],
)
def test_levels(difference, name):
    assert level(difference) == name


@pytest.fixture
def comparison(held_out, continuations):
    return Comparison(("base", "same", "<b>other</b>"), IDS, held_out, continuations)


def page_of(comparison: Comparison) -> str:
    return comparison_page(comparison, name="a & b", facts={"seed": "<0>"}, count=3)


def test_a_page_shows_figures_and_loads_nothing(comparison, held_out):
    page = page_of(comparison)
    assert "&lt;b&gt;other" in page
    assert "<b>other" not in page
    assert "a &amp; b" in page
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|src=|\$[a-z]", page)
    tokens = re.findall(r'<span class="token ', page)
    assert len(tokens) == 12 * 4 + 50  # what was written, and the passage
    assert page.count('role="option" tabindex="0"') == 12 + 1
    # The colours are those of the first adapter, here the base again; the others' are at hand.
    assert not re.search(r'class="token (better|worse)', page)
    other = held_out.summaries(comparison.models)[2]
    assert f"{other.loss:.4f}" in page
    assert f"{other.perplexity:,.2f}" in page
    assert '<option value="1">&lt;b&gt;' in page


def test_a_page_says_without_colours_what_they_say(comparison):
    first, _, other = (comparison.held_out.losses_MNT[model, 0, 0] for model in range(3))
    title = f": loss {first:.2f} → {first:.2f} (0.00), {other:.2f} ({other - first:+.2f})"
    assert title in page_of(comparison)


def test_pages_and_tables_of_texts_alone_and_of_losses_alone(comparison):
    console = Console(width=80)
    for part in (
        dataclasses.replace(comparison, held_out=None),
        dataclasses.replace(comparison, continuations=()),
    ):
        page = page_of(part)
        assert ("Held-out text" in page) == (part.held_out is not None)
        assert ("<h2>Prompt" in page) == bool(part.continuations)
        with console.capture() as capture:
            for table in tables(part, 3):
                console.print(table)
        shown = capture.get()
        assert ("starts without context" in shown) == (part.held_out is not None)
        assert ("prompt: 5 6 7" in shown) == bool(part.continuations)
        assert max(map(len, shown.splitlines())) <= 80


def test_json_has_every_figure_and_is_json(comparison):
    fields = json.loads(json.dumps(to_json(comparison, 3), allow_nan=False))
    assert fields["models"] == list(comparison.models)
    base, same, other = fields["held_out"]["models"]
    assert (base["difference"], same["difference"], same["gained"]) == (0, 0, [])
    assert [len(other["gained"]), len(other["lost"])] == [3, 3]
    assert len(fields["texts"]) == 12
    assert np.shape(fields["texts"][2]["losses"]) == (4, 3)


def test_what_is_not_finite_is_shown_and_null_in_json(comparison):
    losses_MNT = comparison.held_out.losses_MNT.copy()
    losses_MNT[2, 0, :2] = math.nan, math.inf
    broken = dataclasses.replace(
        comparison, held_out=dataclasses.replace(comparison.held_out, losses_MNT=losses_MNT)
    )
    assert to_json(broken, 3)["held_out"]["models"][2]["loss"] is None
    json.dumps(to_json(broken, 3), allow_nan=False)
    assert "+nan" in page_of(broken)
    gained, lost = broken.held_out.largest_changes(2, 3, IDS)
    assert len(gained) == 3
    assert lost[0].token.losses[2] == math.inf


@pytest.mark.parametrize("text", ["\u4e16\u754c" * 9, " wonderful \u306e" * 9])
def test_a_context_joins_bytes_to_characters_and_keeps_its_end(text):
    ids = encode(text)
    losses_MNT = np.zeros((2, 1, len(ids) - 1), np.float32)
    losses_MNT[1, 0, -1] = 1
    held_out = HeldOut("x", ids[None].astype(int), losses_MNT)
    (change,) = held_out.largest_changes(1, 1, Notation())[1]
    assert text[2:4] in change.context
    assert not 0xDC80 <= ord(change.context[0]) <= 0xDCFF
    comparison = Comparison(("base", "a"), Notation(), held_out, ())
    console = Console(width=80)
    with console.capture() as capture:
        console.print(changes_table(comparison, 1, 1))
    assert plain(change.context[-6:]) in capture.get()
    (told,) = to_json(comparison, 1)["held_out"]["models"][1]["lost"]
    json.dumps(told, ensure_ascii=False).encode()


def test_half_characters_and_controls_are_spelt_out():
    ids = encode("\u4e16\x1b[2J<i>\n")
    losses_MT = np.zeros((2, len(ids)), np.float32)
    one = Continuation(0, 0, 1, (50256,), tuple(ids.tolist()), "length", losses_MT)
    comparison = Comparison(("base", "a"), Notation(), None, (one,))
    page = page_of(comparison)
    assert "\x1b" not in page
    assert "<i>\\x1b</i>" in page
    assert "&lt;" in page
    json.dumps(to_json(comparison, 3)).encode()
    page.encode()
    assert readable("a\x1b\n\t\\\udce4") == "a\\x1b\n\t\\\\xe4"
