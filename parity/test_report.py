"""The report says what was found, in any browser, whatever was found and however it is called."""

import base64
import dataclasses
import datetime
import hashlib
import html.parser
import math
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt2_jax.errors import UserError
from parity import charts, environment, heat_map
from parity.activations import SITES, Difference, check_activations
from parity.models import Models, random_tokens
from parity.outcomes import Check
from parity.report import GreedyText, Report, report_page, write_report
from parity.trajectory import LOSS_BOUND, Curve

NASTY = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onfocus='alert(1)",
    "</style></title><!--",
    "&lt;&amp;",
    "$title${maps}",
    "\x00\x1b[2J",
    "\u202egnp.exe",
    "\u2028\r\n\t",
    "\udcf0\udc9f",
    "",
]
words = st.lists(st.text(max_size=5) | st.sampled_from(NASTY), max_size=3).map("".join)

VOID = ("meta", "link", "br")


class Page(html.parser.HTMLParser):
    """What a browser makes of the page: elements with their attributes and their texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.open: list[int] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self.texts.append("")
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for index in self.open:
            self.texts[index] += data

    def all(self, tag: str, kind: str = "") -> list[str]:
        """Texts of the elements with a tag and, if given, a class."""
        return [
            text
            for (name, given), text in zip(self.elements, self.texts, strict=True)
            if name == tag and (not kind or kind in given.get("class", "").split())
        ]

    @property
    def cells(self) -> dict[str, tuple[set[str], str]]:
        """The classes and the text of each place in the heat maps, by id."""
        return {
            given["id"]: (set(given["class"].split()), text)
            for (tag, given), text in zip(self.elements, self.texts, strict=True)
            if tag == "td" and given.get("id")
        }

    @property
    def links(self) -> list[str]:
        return [given["href"] for tag, given in self.elements if tag == "a"]

    @property
    def shape(self) -> list[tuple[str, list[str]]]:
        """All elements, but for the italics of what is spelt out."""
        return [(tag, sorted(given)) for tag, given in self.elements if tag != "i"]


def places(layers: int) -> list[str]:
    blocks = [f"h_{layer}.{site}" for layer in range(layers) for site in SITES]
    return ["embedding", *blocks, "ln_f", "logits"]


def found(layers: int = 2, **relative: float) -> list[Difference]:
    """Differences of 3e-7 where 1e-5 is allowed, but for those given; "__" stands for a dot."""
    given = {place.replace("__", "."): error for place, error in relative.items()}
    return [
        Difference(place, (1, 4, 8), given.get(place, 3e-7), 2e-6, 1e-5) for place in places(layers)
    ]


def a_report(**changes: Any) -> Report:
    theirs = np.linspace(-3, 3, 40, dtype=np.float32).reshape(4, 10)
    report = Report(
        title="a model",
        checks=[
            Check("logits", 2e-6, 1e-4, (4, 10)),
            Check("greedy", 0, 0, counted="5 of 5 equal"),
        ],
        differences={"Hugging Face": found(), "reference": found()},
        logits=(theirs + np.float32(1e-6), theirs),
        greedy=[GreedyText("Hello", " world", " world", 5, 5)],
        curves=None,
        environment={"jax": "0.10.2"},
    )
    return dataclasses.replace(report, **changes)


def page_of(**changes: Any) -> Page:
    return Page(report_page(a_report(**changes)))


def verdict(page: Page) -> str:
    return " ".join(page.all("div", "verdict"))


# The verdict


def test_it_says_that_all_is_well() -> None:
    assert "All 2 checks pass" in verdict(page_of())
    assert not page_of().all("div", "over")


@pytest.mark.parametrize(
    "wrong",
    [
        {"checks": [Check("logits", 1.0, 1e-4), Check("greedy", 0, 0)]},
        {"checks": [Check("logits", math.nan, 1e-4), Check("greedy", 0, 0)]},
        {"differences": {"reference": found(h_1__q=1e-2)}},
        {"checks": []},
    ],
)
def test_nothing_that_is_wrong_passes(wrong: dict[str, Any]) -> None:
    page = page_of(**wrong)
    assert "pass" not in verdict(page)
    assert page.all("div", "verdict") == page.all("div", "over")


def test_it_leads_to_the_first_place_that_differs() -> None:
    differences = {"Hugging Face": found(h_1__q=1e-2, h_1__mlp=0.5), "reference": found(ln_f=1e-2)}
    page = page_of(differences=differences)
    assert "Differs first at h_1.q" in verdict(page)
    assert page.links[:3] == ["#Hugging-Face-h_1.q", "#Hugging-Face-h_1.q", "#reference-ln_f"]
    marked = [place for place, (kinds, _) in page.cells.items() if "first" in kinds]
    assert marked == ["Hugging-Face-h_1.q", "reference-ln_f"]


def test_it_names_a_check_that_fails_where_all_places_agree() -> None:
    checks = [Check("logits", 0, 1e-4), Check("greedy", 1, 0, details=("token 3: 5, not 7",))]
    page = page_of(checks=checks)
    assert "Differs: greedy" in verdict(page)
    assert page.links == ["#check-1"]
    assert page.all("tr", "over")[0].startswith("greedy")
    assert page.all("tr", "details") == ["token 3: 5, not 7"]


def test_every_link_has_somewhere_to_go() -> None:
    page = page_of(
        checks=[Check("logits", 1, 1e-4)], differences={"Hugging Face": found(h_0__k=math.inf)}
    )
    ids = [given["id"] for _, given in page.elements if "id" in given]
    assert len(ids) == len(set(ids))
    assert page.links
    assert {link.removeprefix("#") for link in page.links} <= set(ids)


# The heat map


def test_every_place_has_a_cell_in_order() -> None:
    expected = [
        f"{model}-{place}" for model in ("Hugging-Face", "reference") for place in places(2)
    ]
    assert list(page_of().cells) == expected


def test_the_places_of_real_models_have_cells(small: Models) -> None:
    _, differences = check_activations(small, random_tokens(small.config, (1, 5)))
    cells = page_of(differences=differences).cells
    assert len(cells) == sum(map(len, differences.values()))
    for model, all_ in differences.items():
        for one in all_:
            assert charts.short(one.relative) in cells[heat_map.anchor(model, one.place)][1]


@pytest.mark.parametrize("error", [1.1e-5, 1.0, math.inf, math.nan])
def test_a_place_beyond_its_bound_is_marked_by_more_than_colour(error: float) -> None:
    cells = page_of(differences={"reference": found(h_0__mixed=error)}).cells
    failing = {place for place, (kinds, _) in cells.items() if "over" in kinds}
    assert failing == {"reference-h_0.mixed"}
    text = cells["reference-h_0.mixed"][1]
    assert "✗ " + charts.short(error) in text
    assert "differs by more than rounding" in text
    assert not [place for place, (_, text) in cells.items() if "✗" in text and place not in failing]


def test_a_cell_tells_place_shape_errors_and_bound() -> None:
    text = page_of().cells["Hugging-Face-h_1.c_fc"][1]
    for said in ("3e-7", "h_1.c_fc", "1 x 4 x 8", "3.00e-7", "1.00e-5", "2.00e-6", "3.0% of it"):
        assert said in text


def test_a_larger_difference_is_never_paler() -> None:
    errors = [0.0, 1e-9, 1e-8, 2e-8, 1e-7, 1e-6, 5e-6, 1e-5]
    levels = [heat_map.level(Difference("logits", (), error, 0, 1e-5)) for error in errors]
    assert levels == sorted(levels)
    assert (levels[0], levels[-1]) == (0, heat_map.LEVELS - 1)


@pytest.mark.parametrize("allowed", [0.0, 1e-9, 1e-8, math.inf])
def test_a_strange_bound_does_not_break_the_page(allowed: float) -> None:
    one = Difference("logits", (1,), 1e-9, 0.0, allowed)
    assert len(page_of(differences={"reference": [one]}).cells) == 1


@pytest.mark.parametrize(("layers", "most"), [(12, 1e6), (48, 3e6)])
def test_the_page_of_a_deep_model_stays_small(layers: int, most: float) -> None:
    rng = np.random.default_rng(0)
    theirs = rng.normal(size=(8, 50257)).astype(np.float32)
    page = report_page(
        a_report(
            differences={"Hugging Face": found(layers), "reference": found(layers)},
            logits=(theirs + np.float32(1e-6) * rng.normal(size=theirs.shape), theirs),
        )
    )
    assert len(page.encode()) < most


# The figures


def test_the_largest_differences_and_the_ends_are_drawn() -> None:
    rng = np.random.default_rng(0)
    theirs = rng.normal(size=100_000)
    ours = theirs + 1e-6 * rng.normal(size=theirs.size)
    ours[777] += 1.0
    chosen = charts.points_to_draw(ours, theirs)
    assert chosen.size <= charts.MOST_POINTS
    assert {777, theirs.argmin(), theirs.argmax()} <= set(chosen.tolist())
    assert np.array_equal(chosen, charts.points_to_draw(ours, theirs))


def test_all_points_of_a_small_array_are_drawn() -> None:
    page = page_of()
    (points,) = [g["d"] for tag, g in page.elements if tag == "path" and g["class"] == "points"]
    assert points.count("M") == 40


@pytest.mark.parametrize("strange", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_told(strange: float) -> None:
    ours, theirs = a_report().logits
    ours = ours.copy()
    ours[1, 2] = strange
    page = page_of(logits=(ours, theirs))
    assert "1 of 40 are NaN or infinite" in "".join(page.all("p", "over"))
    assert "svg" in dict(page.elements)
    nothing = page_of(logits=(np.full_like(theirs, strange), theirs))
    assert "40 of 40 are NaN or infinite" in "".join(nothing.all("p", "over"))


@pytest.mark.parametrize("value", [0.0, 5.0, -3e38, 1e-30])
def test_logits_that_are_all_the_same_can_be_drawn(value: float) -> None:
    same = np.full((2, 3), value, np.float32)
    figure = "".join(g["d"] for tag, g in page_of(logits=(same, same)).elements if tag == "path")
    assert "nan" not in figure
    assert "inf" not in figure


def test_logits_of_two_shapes_are_told() -> None:
    text = "".join(page_of(logits=(np.ones((2, 3)), np.ones((2, 4)))).all("p", "over"))
    assert "(2, 3) in JAX, (2, 4)" in text


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-0.03, 0.02), (1e-9, 3e-9), (10.8123, 10.8125), (-3e38, 3e38)]
)
def test_ticks_are_round_few_and_inside(low: float, high: float) -> None:
    axis = charts.Axis("x", low, high, 0, 100)
    ticks = axis.ticks()
    assert 3 <= len(ticks) <= 7
    assert all(-0.01 <= pixel <= 100.01 for pixel in axis.at(np.array(ticks)))
    assert len({axis.name(tick) for tick in ticks}) == len(ticks)


@pytest.mark.parametrize(
    ("number", "shown"),
    [(3.2e-7, "3e-7"), (0.0, "0"), (-0.0, "0"), (1.0, "1e0"), (math.nan, "nan"), (math.inf, "inf")],
)
def test_numbers_are_short(number: float, shown: str) -> None:
    assert charts.short(number) == shown


def curves(ours: list[float], theirs: list[float]) -> dict[str, tuple[Curve, Curve]]:
    return {"curves": (Curve(ours, [], {}), Curve(theirs, [], {}))}


def test_training_is_shown_where_there_was_any() -> None:
    assert "Training" not in page_of().all("h2")
    page = page_of(**curves([11, 10.5, 10], [11, 10.5001, 10]))
    assert "Training" in page.all("h2")
    facts = dict(zip(page.all("dt"), page.all("dd"), strict=True))
    assert facts["last loss in JAX"] == "10.000000"
    assert facts["largest difference"] == "1.0e-4 at step 1"
    assert facts["result"] == "✓ ok"


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ([11, 10 + 2 * LOSS_BOUND["float32"]], [11, 10]),
        ([11, math.nan], [11, 10]),
        ([math.inf, 10], [11, 10]),
        ([math.nan], [math.nan]),
        ([math.inf, 10], [math.inf, 10]),
        ([11, 10, 9], [11, 10]),
    ],
)
def test_training_that_parts_is_marked(ours: list[float], theirs: list[float]) -> None:
    page = page_of(**curves(ours, theirs))
    assert page.all("dd")[-1] == "✗ differs"
    drawn = "".join(given["d"] for tag, given in page.elements if tag == "path")
    assert "nan" not in drawn
    assert "inf" not in drawn


def test_one_step_without_a_difference_can_be_drawn() -> None:
    assert page_of(**curves([11.0], [11.0])).all("dd")[-1] == "✓ ok"


# Greedy texts


def test_texts_that_part_are_marked_where_they_do() -> None:
    page = page_of(greedy=[GreedyText("Hello", " big world", " big wide", 2, 5)])
    assert page.all("mark") == ["orld", "ide"]
    assert page.all("span", "prompt") == ["Hello", "Hello"]
    assert page.all("p", "over") == ["✗ 2 of 5 tokens equal"]


def test_a_text_that_ends_early_is_marked() -> None:
    page = page_of(greedy=[GreedyText("Hello", " big", " big wide", 2, 5)])
    assert page.all("mark") == ["end", " wide"]


def test_other_tokens_with_the_same_text_are_told() -> None:
    page = page_of(greedy=[GreedyText("Hello", " big", " big", 2, 5)])
    assert page.all("mark") == []
    assert "which read the same" in page.all("p", "over")[0]


# The browser


@settings(max_examples=50, deadline=None)
@given(words, words, words)
@example("</title></head>", "</script>", '"><img src=x onerror=alert(1)>')
def test_no_text_can_become_part_of_the_page(title: str, name: str, text: str) -> None:
    def made(title: str, name: str, text: str) -> Page:
        return page_of(
            title=title,
            checks=[Check(name, 1, 0, counted=text, where=text + "w", details=(text,))],
            greedy=[GreedyText(text, name + " ", name + " ", 1, 1)],
            environment={name: text},
            differences={name + "m": found(1, ln_f=1.0)},
        )

    page = made(title, name, text)
    assert page.shape == made("t", "n", "x").shape
    assert page.all("title")[0].isprintable()


def test_the_page_loads_nothing_and_handles_no_event_inline() -> None:
    page = report_page(a_report(**curves([11, 10], [11, 10])))
    assert not re.search(r"https?:|[\"'(=]//|@import|url\(|fetch|XMLHttp", page)
    for tag, attributes in Page(page).elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        assert not set(attributes) & {"src", "srcset", "action", "data", "poster"}
        if "href" in attributes:
            assert attributes["href"].startswith("#" if tag == "a" else "data:,")


def test_the_browser_is_told_to_run_what_the_page_came_with_and_nothing_else() -> None:
    page = page_of()
    policy = next(given["content"] for _, given in page.elements if "http-equiv" in given)
    digests = [
        base64.b64encode(hashlib.sha256(page.all(tag)[0].encode()).digest()).decode()
        for tag in ("style", "script")
    ]
    assert len(page.all("style")) == len(page.all("script")) == 1
    assert policy.split("; ") == [
        "default-src 'none'",
        "img-src data:",
        f"style-src 'sha256-{digests[0]}'",
        f"script-src 'sha256-{digests[1]}'",
    ]


def test_each_heat_map_is_reached_by_keys() -> None:
    page = page_of(differences={"reference": found(), "other": found(h_1__q=1.0)})
    stops = [given for tag, given in page.elements if tag == "td" and given.get("tabindex") == "0"]
    assert [stop["id"] for stop in stops] == ["reference-embedding", "other-h_1.q"]


# What it ran with, and the file


def test_the_environment_names_versions_and_no_machine() -> None:
    told = environment.environment()
    assert {"Python", "jax", "torch", "numpy", "gpt2-jax", "CPU", "JAX device"} <= set(told)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", told["date"])
    assert told["date"][:4] >= str(datetime.datetime.now(datetime.UTC).year - 1)
    everything = " ".join(told.values())
    assert socket.gethostname() not in everything
    assert str(Path.home()) not in everything


def test_the_page_is_written_whole(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", a_report())
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == report_page(a_report())
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("name", ["missing/report.html", ".", ""])
def test_a_file_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^cannot write [^\n]*; give a file in a directory that e"):
        write_report(Path(name), a_report())
    assert list(tmp_path.iterdir()) == []
