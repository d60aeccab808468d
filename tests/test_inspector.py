"""The token inspector: the numbers are right, and no token can break the table or the page."""

import base64
import hashlib
import html.parser
import io
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from gpt2_jax import tokenizer
from gpt2_jax.errors import UserError
from gpt2_jax.generation.inspector import (
    Alternative,
    ExplainedText,
    ExplainedToken,
    explain,
    percent,
    token_table,
    visible,
    width_of_lines,
)
from gpt2_jax.generation.inspector_page import inspector_page, write_page

NASTY = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onfocus='alert(1)",
    "<!--",
    "]]>",
    "&lt;&amp;",
    "$cards${note}",
    "[red]x[/red][/]",
    ":smile:",
    "\x1b[2J\x1b]0;title\x07",
    "\x9b31m",
    "\u202egnp.exe",
    "\u2028\r\n\t",
    "\ufffd",
    "\udcf0\udc9f",
    "\u0301",
    "\\n",
    "",
]
bytes_ = st.characters(categories=["Cs"], min_codepoint=0xDC80, max_codepoint=0xDCFF)
words = st.lists(
    st.text(st.characters() | bytes_, max_size=5) | st.sampled_from(NASTY), max_size=3
).map("".join)


class New(NamedTuple):
    """What the decoder tells about a token."""

    row: int
    token: int
    logprob: float
    alternatives: list[tuple[int, float]]
    finish_reason: str | None


def explained(*ids: int, rivals: int = 0, ids_only: bool = False) -> ExplainedText:
    alternatives = [(token, -1.0 - token) for token in range(rivals)]
    return explain("Hi", [New(0, i, -1.0, alternatives, None) for i in ids], ids=ids_only)


def token(text="x", probability=0.5, rivals=(), number=0) -> ExplainedToken:
    """Token 0 unless told, with rivals (text, probability) numbered from 0."""
    logprob = math.log(probability) if probability else -math.inf
    alternatives = (Alternative(i, t, math.log(p)) for i, (t, p) in enumerate(rivals))
    return ExplainedToken(number, text, logprob, tuple(alternatives))


def printed(text: ExplainedText, width: int = 80, *, terminal: bool = False) -> str:
    file = io.StringIO()
    colours = {"force_terminal": True, "color_system": "truecolor"} if terminal else {}
    Console(file=file, width=width, **colours).print(token_table(text))
    return file.getvalue()


# What tokens stand for


@settings(max_examples=100)
@given(st.text(max_size=30))
def test_the_texts_of_the_tokens_join_to_the_text(text):
    tokens = explained(*tokenizer.encode(text)).tokens
    joined = "".join(token.text for token in tokens)
    assert joined.encode("utf-8", "surrogateescape") == text.encode()


def test_parts_of_a_character_are_shown_as_the_bytes_they_are():
    tokens = explained(*tokenizer.encode("\U0001f600")).tokens
    assert len(tokens) > 1
    assert "".join(visible(token.text) for token in tokens) == r"\xf0\x9f\x98\x80"


def test_tokens_of_another_vocabulary_are_shown_by_their_ids():
    text = explained(2, 0, rivals=2, ids_only=True)
    assert [token.text for token in text.tokens] == ["<2>", "<0>"]
    assert [rival.text for rival in text.tokens[0].alternatives] == ["<0>", "<1>"]


def test_the_rows_of_a_padded_vocabulary_are_shown_by_their_ids():
    texts = [token.text for token in explained(50256, 50257, 50303).tokens]
    assert texts == ["<|endoftext|>", "<50257>", "<50303>"]


@given(words)
def test_whatever_a_token_holds_is_visible_and_harmless(text):
    shown = visible(text)
    assert shown.isprintable()
    assert not re.search(r"[\s\ufffd\udc80-\udcff]", shown)
    assert bool(shown) == bool(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("father", "father"),
        (" the", "␣the"),
        ("\n\t", r"\n\t"),
        ("\x1b[31m", r"\x1b[31m"),
        ("\\n", r"\\n"),
        ("a\u00a0b", r"a\u00a0b"),  # not \xa0, which is the byte
        ("\udca0", r"\xa0"),
        ("\u202e", r"\u202e"),
        ("\ufffd", r"\ufffd"),
        ("\U000e0001", r"\U000e0001"),
        ("\u0301", "◌\u0301"),
        ("你好é😀", "你好é😀"),
    ],
)
def test_signs_that_nobody_sees_are_spelt_out(text, shown):
    assert visible(text) == shown


# Numbers


@pytest.mark.parametrize(
    ("probability", "shown"),
    [(1.0, "100.0%"), (0.1234, "12.3%"), (0.0005, "0.1%"), (0.0004, "<0.1%"), (0.0, "<0.1%")],
)
def test_a_small_probability_is_not_shown_as_none(probability, shown):
    assert percent(probability) == shown


def test_surprise_is_in_bits():
    assert token(probability=1 / 8).bits == pytest.approx(3.0, abs=1e-12)
    assert token(probability=0).bits == math.inf


def test_a_logprob_that_rounding_left_above_zero_is_certainty():
    certain = ExplainedToken(0, "x", 1e-7, ())
    assert (certain.probability, certain.bits) == (1.0, 0.0)
    assert math.copysign(1, certain.bits) == 1  # else it reads "-0.0"


@pytest.mark.parametrize(
    ("probability", "level"),
    [(1, 0), (0.51, 0), (0.49, 1), (0.21, 1), (0.19, 2), (0.06, 2), (0.04, 3), (0.009, 4), (0, 4)],
)
def test_levels_are_the_bands_of_the_legend(probability, level):
    assert token(probability=probability).level == level


def test_the_rank_is_the_place_among_the_alternatives():
    rivals = [("a", 0.4), ("b", 0.3), ("c", 0.1)]
    assert [token(rivals=rivals, number=n).rank for n in range(4)] == [1, 2, 3, None]


def test_perplexity_of_even_odds_is_their_number():
    text = ExplainedText("", (token(probability=1 / 8),) * 5)
    assert text.perplexity == pytest.approx(8.0, rel=1e-12)
    assert text.mean_logprob == pytest.approx(-math.log(8), rel=1e-12)


def test_perplexity_of_the_impossible_is_infinite():
    assert ExplainedText("", (token(probability=0),)).perplexity == math.inf
    assert ExplainedText("", (ExplainedToken(0, "x", -1e30, ()),)).perplexity == math.inf


# In the terminal


def test_a_row_has_all_the_numbers():
    rivals = [(" a", 0.5), (" b", 0.25)]
    text = ExplainedText("Once upon", (token(" b", 0.25, rivals, 1), token("c", 0.125, rivals, 7)))
    title, header, first, second, summary = (line.split() for line in printed(text).splitlines())
    assert title == ["Once", "upon"]
    assert header == ["token", "prob", "rank", "bits", "likeliest", "tokens"]
    assert first == ["␣b", "25.0%", "2", "2.0", "50.0%", "␣a", "25.0%", "␣b"]
    assert second == ["c", "12.5%", ">2", "3.0", "50.0%", "␣a", "25.0%", "␣b"]
    assert " ".join(summary) == "tokens 2 mean log-probability -1.733 perplexity 5.7"


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_table_keeps_to_the_width_and_loses_no_token(width):
    rivals = [(f" rival{n}", 0.1) for n in range(8)]
    long = "abcdefghijklmnopqrstuvwxyz" * 3
    text = ExplainedText("p" * 500, (token(long, 0.1, rivals), token("你好" * 20, 0.1, rivals)))
    lines = printed(text, width).splitlines()
    assert max(map(cell_len, lines)) <= width
    header = next(line for line in lines if "prob" in line and "rank" in line)
    first_column = "".join(line[: header.index("prob") - 1] for line in lines)
    letters = "".join(re.findall(r"[a-z]", first_column.split("token", 1)[1]))
    assert letters.startswith(long)


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_where_there_is_room_each_token_is_a_line(count):
    rivals = [(f" long rival{n}", 0.02) for n in range(count)]
    text = ExplainedText("p" * 500, (token("x" * 24, 1e-9, rivals, 99), token("y", 1.0, rivals)))
    lines = printed(text, width_of_lines(text)).splitlines()
    assert len(lines) == 5  # the prompt, the header, the tokens, the figures
    assert [line.count("rival") for line in lines[2:4]] == [count, count]


def test_colours_go_to_a_terminal_only():
    text = ExplainedText("p", (token(probability=0.9), token(probability=0.001)))
    assert "\x1b" not in printed(text)
    shown = printed(text, terminal=True)
    assert len(set(re.findall(r"\x1b\[30;48;2;[\d;]+m", shown))) == 2
    assert re.sub(r"\x1b\[[\d;]*m", "", shown) == printed(text)


@settings(max_examples=50)
@given(words, words, words)
def test_no_token_acts_on_the_terminal(prompt, chosen, rival):
    text = ExplainedText(prompt, (token(chosen, 0.5, [(rival, 0.3)]),))
    assert all(line.isprintable() for line in printed(text).split("\n"))


@pytest.mark.parametrize("text", ["[red]x[/red]", "[/]", ":smile:", "12.5 'a' None"])
def test_markup_in_a_token_is_text_like_any_other(text):
    shown = printed(ExplainedText("p" + text, (token(text, 0.5, [(text, 0.3)]),)), terminal=True)
    assert "p" + text in shown
    assert shown.count(visible(text)) >= 2


# In the browser


class Page(html.parser.HTMLParser):
    """What a browser makes of the page: elements, the text of tokens, scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.contents: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.tokens: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.contents.append((tag, ""))
        if tag not in ("meta", "link", "input"):
            kind = dict(attrs).get("class") or ""
            self.open.append("token" if kind.startswith("token") else tag)
            if kind.startswith("token"):
                self.tokens.append("")

    def handle_endtag(self, _):
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            tag, before = self.contents[-1]
            self.contents[-1] = (tag, before + data)
        elif "token" in self.open:
            self.tokens[-1] += data
        else:
            self.text += data

    @property
    def cards(self):
        scripts = [text for tag, text in self.contents if tag == "script"]
        assert not set("<>&") & set(scripts[0])  # browsers end a script in more ways than one
        return json.loads(scripts[0])

    @property
    def shape(self):
        """All elements with their attributes' names, but for the italics of what is spelt out."""
        elements = [(tag, sorted(attributes)) for tag, attributes in self.elements]
        italics = [("i", []), ("i", ["class"])]
        return [element for element in elements if element not in italics], self.open


def page_of(*texts: str, **options: str) -> Page:
    return Page(inspector_page([ExplainedText("p", tuple(map(token, texts)))], **options))


@settings(max_examples=100)
@given(words, words, words, words)
@example("</title></head>", "</script>", '"><img src=x onerror=alert(1)>', "<!--<script>")
def test_no_text_can_become_part_of_the_page(note, prompt, chosen, rival):
    def page(note, prompt, chosen, rival):
        text = ExplainedText(prompt, (token(chosen, 0.5, [(rival, 0.3)]),))
        return Page(inspector_page([text], note=note))

    made = page(note, prompt, chosen, rival)
    assert made.shape == page("n" if note else "", "p", "t", "r").shape
    assert made.shape[1] == []
    assert made.cards[0]["text"] == visible(chosen)
    assert made.cards[0]["rows"][0]["text"] == visible(rival)


@settings(max_examples=50)
@given(st.lists(words, max_size=4))
def test_every_token_is_in_the_page_in_order(texts):
    page = page_of(*texts)
    assert len(page.tokens) == len(texts)
    assert [card["text"] for card in page.cards] == [visible(text) for text in texts]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" the", " the"),
        ("\n\n", "↵\n↵"),  # the last line break comes after the token
        ("a\nb", "a↵\nb"),
        ("\\n", "\\n"),
        ("\t", r"\t"),
        ("<b>&amp;", "<b>&amp;"),
        ("\udcf0\udc9f", r"\xf0\x9f"),
        ("\ufffd", r"\ufffd"),
        ("你好", "你好"),
    ],
)
def test_the_text_reads_as_it_was_written(text, shown):
    assert page_of(text).tokens == [shown]


def test_a_card_has_all_the_numbers():
    rivals = [("a", 0.5), (" b", 0.25)]
    text = ExplainedText("p", (token(" b", 0.25, rivals, 1), token("c", 0.125, rivals, 7)))
    among, beyond = Page(inspector_page([text])).cards
    assert (among["percent"], among["bits"], among["rank"], among["id"]) == ("25.0%", "2.0", "2", 1)
    assert [(row["text"], row["percent"], row["chosen"]) for row in among["rows"]] == [
        ("a", "50.0%", False),
        ("␣b", "25.0%", True),
    ]
    assert among["rest"] == "25.0%"
    assert (beyond["rank"], beyond["rest"]) == ("not in top 2", "12.5%")
    last = beyond["rows"][-1]
    assert (last["text"], last["percent"], last["chosen"]) == ("c", "12.5%", True)
    assert last["probability"] == pytest.approx(0.125, rel=1e-12)


def test_a_page_has_every_sample_and_what_made_them():
    texts = [ExplainedText(f"prompt {n}", (token(probability=1 / 8),)) for n in range(3)]
    page = Page(inspector_page(texts, note="temperature 0.8"))
    for shown in ("temperature 0.8", "prompt 0", "prompt 1", "prompt 2", "Sample 3"):
        assert shown in page.text
    assert page.text.count("perplexity 8.0") == 3
    assert "Sample" not in Page(inspector_page(texts[:1])).text


def test_tokens_are_reached_by_keys_one_stop_a_sample():
    page = page_of("a", "b", "c")
    tokens = [given for tag, given in page.elements if given.get("role") == "option"]
    assert [given["tabindex"] for given in tokens] == ["0", "-1", "-1"]
    assert [given["aria-label"] for given in tokens] == ["a, 50.0%", "b, 50.0%", "c, 50.0%"]


@pytest.mark.parametrize("logprob", [-math.inf, math.nan])
def test_numbers_that_json_does_not_have_do_not_break_the_page(logprob):
    strange = ExplainedToken(0, "x", logprob, (Alternative(0, "x", logprob),))
    text = ExplainedText("p", (strange,))
    (card,) = Page(inspector_page([text])).cards
    assert card["rows"][0]["probability"] == 0
    assert str(logprob).removeprefix("-") in printed(text)


def test_the_page_loads_nothing_from_anywhere():
    page = inspector_page([explained(464, rivals=3)])
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch|XMLHttp", page)
    parsed = Page(page)
    links = [
        value
        for _, given in parsed.elements
        for name, value in given.items()
        if name in ("src", "href", "srcset", "action", "data", "poster")
    ]
    assert links == ["data:,"]


def test_the_browser_is_told_to_run_what_the_page_came_with_and_nothing_else():
    page = page_of("x")
    policy = next(given["content"] for tag, given in page.elements if "http-equiv" in given)
    (style,) = [text for tag, text in page.contents if tag == "style"]
    _, script = [text for tag, text in page.contents if tag == "script"]

    def sha256(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    assert policy.split("; ") == [
        "default-src 'none'",
        "img-src data:",
        f"style-src 'sha256-{sha256(style)}'",
        f"script-src 'sha256-{sha256(script)}'",
    ]
    assert not [given for _, given in page.elements if "style" in given]


# The file


def test_the_page_is_written_whole(tmp_path):
    texts = [explained(464, rivals=2)]
    write_page(tmp_path / "page.html", texts, note="n")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == inspector_page(texts, note="n")
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("name", ["missing/page.html", ".", ""])
def test_a_file_that_cannot_be_written_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^cannot write .*; give a file in a directory that exi"):
        write_page(Path(name), [])
    assert list(tmp_path.iterdir()) == []
