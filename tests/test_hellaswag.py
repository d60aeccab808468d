"""HellaSwag: the losses are those of the endings' tokens alone, whatever the batch."""

import functools
import gzip
import hashlib
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax.config import GPT2Config
from gpt2_jax.errors import UserError
from gpt2_jax.evaluation import hellaswag
from gpt2_jax.evaluation.hellaswag import (
    HellaSwagScore,
    Item,
    encode_items,
    ending_losses,
    make_hellaswag,
    read_items,
    score,
)
from gpt2_jax.model import GPT2, apply, init_params
from gpt2_jax.tokenizer import encode

CONFIG = GPT2Config(n_positions=80, n_embd=8, n_layer=1, n_head=2)
MODEL = GPT2(CONFIG)
ITEMS = [
    Item("A man is sitting on a roof. he", ("is wrapping.", "naps", "falls off it", "sings a"), 3),
    Item("The dog", ("barks at the moon", "reads", "is a very good dog", "flies away, far"), 0),
    Item("One, two. " * 18, ("three and four, five", "six", "and so on", "no more of it"), 2),
]
LINE = {"ctx": "The dog", "endings": ["barks", "reads", "sings", "naps"], "label": 0}


@pytest.fixture(scope="module")
def params():
    """Parameters large enough that every token's loss is another."""
    initial = init_params(CONFIG, jax.random.key(0))
    return jax.tree.map(lambda leaf: 20 * leaf if leaf.ndim == 2 else leaf, initial)


def favouring(token):
    """Parameters of a model that always predicts one token, for a gain of about 2 nats.

    The position embeddings are all there is to a text, and only this token's embedding is like
    them.
    """
    zeros = jax.tree.map(jnp.zeros_like, init_params(CONFIG, jax.random.key(0)))
    direction_D = jnp.array([1.0, -1.0] * 4)
    table_VD = zeros["wte"]["embedding"].at[token].set(direction_D / 4)
    positions_TD = jnp.broadcast_to(direction_D[None], (CONFIG.n_positions, 8))
    ln_f = {"scale": jnp.ones(8), "bias": jnp.zeros(8)}
    return zeros | {
        "wte": {"embedding": table_VD},
        "wpe": {"embedding": positions_TD},
        "ln_f": ln_f,
    }


def write(path, *lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


forward = jax.jit(functools.partial(apply, MODEL))
losses_of_rows = jax.jit(functools.partial(ending_losses, model=MODEL))


def plain_losses(params, item):
    """Sum and mean for each ending [4], one text at a time, without padding or cutting."""
    context = encode(item.context).tolist()
    results = []
    for text in item.endings:
        ending = encode(" " + text).tolist()
        inputs_BT = np.array([(context + ending)[:-1]])
        logits_TV = np.asarray(forward(params, inputs_BT), np.float64)[0, -len(ending) :]
        normaliser_T = np.log(np.exp(logits_TV).sum(axis=-1))
        losses_T = normaliser_T - logits_TV[np.arange(len(ending)), ending]
        results.append((losses_T.sum(), losses_T.mean()))
    return np.array(results).T


def batched_losses(params, items):
    """Sums and means [N, 4], from the rows of every length."""
    sums_NE, means_NE = np.full((2, len(items), 4), np.nan)
    for rows in encode_items(items, CONFIG.n_positions):
        sum_B, mean_B = losses_of_rows(params, rows.tokens_BT, rows.mask_BT)
        assert sum_B.dtype == mean_B.dtype == jnp.float32
        sums_NE.flat[rows.places_B], means_NE.flat[rows.places_B] = sum_B, mean_B
    return sums_NE, means_NE


def test_losses_are_those_of_one_text_at_a_time(params):
    sums_NE, means_NE = batched_losses(params, ITEMS)
    expected_N2E = np.stack([plain_losses(params, item) for item in ITEMS])
    # float32 sums of up to 5 losses near 15, in another order.
    np.testing.assert_allclose(sums_NE, expected_N2E[:, 0], atol=1e-5)
    np.testing.assert_allclose(means_NE, expected_N2E[:, 1], atol=1e-5)


def test_the_rows_hold_context_and_ending_and_mark_the_ending():
    assert [rows.tokens_BT.shape for rows in encode_items(ITEMS, 80)] == [(8, 65), (4, 81)]
    for rows in encode_items(ITEMS, 80):
        for tokens_T, mask_T, place in zip(*rows, strict=True):
            item = ITEMS[place // 4]
            context, ending = encode(item.context), encode(" " + item.endings[place % 4])
            used = len(context) + len(ending)
            assert tokens_T.tolist() == [*context, *ending, *[0] * (len(tokens_T) - used)]
            assert np.flatnonzero(mask_T).tolist() == list(range(len(context), used))


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 90)), min_size=1, max_size=5),
    st.integers(90, 200),
)
def test_a_long_context_is_cut_from_the_left_and_lengths_are_few(sizes, max_length):
    """ " a" is one token, so the sizes are in tokens."""
    items = [Item("b" + " a" * (size - 1), ("a" + " a" * (n - 1),) * 4, 0) for size, n in sizes]
    for rows in encode_items(items, max_length):
        length = rows.tokens_BT.shape[1] - 1
        assert length == max_length or (length < max_length and length % 64 == 0)
        for tokens_T, mask_T, place in zip(*rows, strict=True):
            context, ending = sizes[place // 4]
            end = min(context + ending, max_length + 1)
            assert length - 64 < end - 1 <= length
            assert np.flatnonzero(mask_T).tolist() == list(range(end - ending, end))
            # Its first token is the context's only where nothing was cut.
            assert (tokens_T[0] == encode("b")[0]) == (context + ending <= max_length + 1)
            assert not tokens_T[end:].any()


def test_a_row_that_just_fits_is_not_padded_further():
    """One token is only an input and one only a target: 65 tokens are 64 of each."""
    items = [Item("b" + " a" * (size - 1), ("a",) * 4, 0) for size in (65, 64, 3)]
    (short, long) = encode_items(items, 1024)
    assert (short.tokens_BT.shape, long.tokens_BT.shape) == ((8, 65), (4, 129))


def test_every_ending_of_every_item_is_there_once():
    rows = encode_items(ITEMS, 80)
    assert sorted(np.concatenate([group.places_B for group in rows]).tolist()) == list(range(12))


def test_an_ending_longer_than_the_model_is_refused():
    item = Item("b", ("a", "a", "a" + " a" * 9, "a"), 0)
    assert encode_items([item], 10)[0].tokens_BT.shape == (4, 11)
    with pytest.raises(UserError, match=r"ending 2 of HellaSwag item 2 has 10 tokens, .*=9"):
        encode_items([ITEMS[1]._replace(endings=("a",) * 4), item], 9)


def test_the_score_does_not_depend_on_the_batch_size(params):
    """The labels are the likeliest endings: a single wrong loss would show."""
    sums_NE, means_NE = batched_losses(params, ITEMS)
    winners_N = sums_NE.argmin(axis=-1)
    items = [item._replace(label=int(n)) for item, n in zip(ITEMS, winners_N, strict=True)]
    expected = score(winners_N, sums_NE, means_NE)
    assert expected.acc == 1
    assert {make_hellaswag(MODEL, items, size)(params) for size in (1, 5, 16)} == {expected}


@pytest.mark.parametrize(("word", "expected"), [(" cat", 1.0), (" dog", 0.0), (" sky", 0.5)])
def test_the_ending_a_model_favours_wins(word, expected):
    """Endings of one length, so that sum and mean agree; with no favourite, the first wins."""
    items = [
        Item("I saw a", ("dog", "cat", "dog", "dog"), 1),
        Item("You saw a big", ("cat", "dog", "dog", "dog"), 0),
    ]
    (token,) = encode(word)
    result = make_hellaswag(MODEL, items, 4)(favouring(token))
    assert result == HellaSwagScore(acc=expected, acc_norm=expected, items=2)


def test_acc_takes_the_smallest_sum_and_acc_norm_the_smallest_mean():
    labels_N = np.array([0, 1, 3])
    sums_NE = np.array([[1, 2, 3, 4], [4, 1, 3, 2], [1, 2, 3, 4]])
    means_NE = np.array([[2, 1, 3, 4], [1, 4, 3, 2], [4, 3, 2, 1]])
    assert score(labels_N, sums_NE, means_NE) == HellaSwagScore(2 / 3, 1 / 3, 3)


def test_every_batch_has_one_of_few_shapes_and_nothing_compiles_again(params, monkeypatch):
    shapes, traces = [], []

    def put(array):
        shapes.append(array.shape)
        return jnp.asarray(array)

    def traced(*args, **kwargs):
        traces.append(args)
        return ending_losses(*args, **kwargs)

    monkeypatch.setattr(hellaswag, "ending_losses", traced)
    evaluate = make_hellaswag(MODEL, ITEMS, 5, put)
    first = evaluate(params)
    # 8 short rows and 4 long ones make 2 + 1 batches, each of tokens and a mask.
    assert shapes == 4 * [(5, 65)] + 2 * [(5, 81)]
    assert len(traces) == 2
    assert evaluate(params) == first
    assert evaluate(favouring(0)) != first
    assert len(traces) == 2


def test_rows_may_be_split_over_devices(params):
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    whole = jax.NamedSharding(mesh, jax.P())
    evaluate = make_hellaswag(
        MODEL, ITEMS, 2 * jax.device_count(), lambda array: jax.device_put(array, rows), whole
    )
    assert evaluate(jax.device_put(params, whole)) == make_hellaswag(MODEL, ITEMS, 4)(params)


def test_a_model_of_another_vocabulary_is_refused(tiny_config):
    with pytest.raises(UserError, match="vocab_size=97 is less than the 50257"):
        make_hellaswag(GPT2(tiny_config), ITEMS, 4)


@pytest.mark.parametrize("name", ["items.jsonl", "items.jsonl.gz"])
def test_items_are_read_from_plain_and_gzipped_lines(tmp_path, name):
    text = "".join(json.dumps({**LINE, "label": label}) + "\n" for label in (2, 0, 1))
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    items = read_items(path)
    assert items[0] == Item("The dog", ("barks", "reads", "sings", "naps"), 2)
    assert [item.label for item in items] == [2, 0, 1]
    assert read_items(path, limit=2) == items[:2]
    assert read_items(path, limit=9) == items


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[1]", "is not a JSON object"),
        (json.dumps({**LINE, "ctx": ""}), "ctx='' must be"),
        (json.dumps({"endings": LINE["endings"], "label": 0}), "ctx=None must be"),
        (json.dumps({**LINE, "ctx": 5}), "ctx=5 must be"),
        (json.dumps({**LINE, "endings": ["a", "b", "c"]}), r"endings=\['a', 'b', 'c'\] must be 4"),
        (json.dumps({**LINE, "endings": ["a", "b", "c", 1]}), "must be 4 texts"),
        (json.dumps({**LINE, "endings": ["a", "b", "c", ""]}), "must be 4 texts"),
        (json.dumps({**LINE, "endings": "abcd"}), "endings='abcd' must be 4 texts"),
        (json.dumps({**LINE, "label": 4}), "label=4 must be a whole number from 0 to 3"),
        (json.dumps({**LINE, "label": -1}), "label=-1 must be"),
        (json.dumps({**LINE, "label": "1"}), "label='1' must be"),
        (json.dumps({**LINE, "label": True}), "label=True must be"),
    ],
)
def test_a_bad_line_is_told_with_file_and_number(tmp_path, line, complaint):
    path = write(tmp_path / "items.jsonl", json.dumps(LINE), line, json.dumps(LINE))
    with pytest.raises(UserError, match=rf"items\.jsonl, line 2:? .*{complaint}.*; take the file"):
        read_items(path)
    assert len(read_items(path, limit=1)) == 1


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("items.jsonl", b"", "items.jsonl is empty"),
        ("items.jsonl", b"\xff\n", "cannot read .*items.jsonl: .*0xff"),
        ("items.jsonl.gz", b"plain text", "cannot read .*items.jsonl.gz: Not a gzipped file"),
        (
            "items.jsonl.gz",
            gzip.compress(b"{}", mtime=0)[:-9],
            "cannot read .*items.jsonl.gz: Compressed",
        ),
        (
            "items.jsonl.gz",
            gzip.compress(b"{}", mtime=0)[:10] + b"\xff" * 9,
            "cannot read .*jsonl.gz: Err",
        ),
        ("items.jsonl", None, "cannot read .*items.jsonl: No such file"),
    ],
)
def test_a_bad_file_is_told_with_its_name(tmp_path, name, content, complaint):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=complaint) as raised:
        read_items(tmp_path / name)
    assert "\n" not in str(raised.value)
    assert "give HellaSwag's hellaswag_val.jsonl" in str(raised.value)


@pytest.mark.parametrize("limit", [0, -1, 1.5])
def test_a_limit_that_is_no_count_is_refused(tmp_path, limit):
    with pytest.raises(UserError, match="limit="):
        read_items(write(tmp_path / "items.jsonl", json.dumps(LINE)), limit)


@pytest.mark.skipif("GPT2_JAX_SHARED" not in os.environ, reason="GPT2_JAX_SHARED is not set")
def test_the_validation_set_is_read_whole_and_fits_three_lengths():
    path = Path(os.environ["GPT2_JAX_SHARED"]) / "data" / "hellaswag_val.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    assert hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest().startswith("0aa3b888")
    items = read_items(path)
    assert len(items) == 10_042
    assert items[0].context == "A man is sitting on a roof. he"
    assert items[0].endings[3] == "starts pulling up roofing on a roof."
    assert items[0].label == 3
    assert read_items(path, limit=3) == items[:3]
    assert [rows.tokens_BT.shape[1] for rows in encode_items(items, 1024)] == [65, 129, 193]
