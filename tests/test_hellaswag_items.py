"""HellaSwag's items: what is read is what the file says, and a bad file is told in one line."""

import contextlib
import gzip
import hashlib
import http.server
import json
import os
import socket
from pathlib import Path

import pytest

from gpt2_jax.errors import UserError
from gpt2_jax.evaluation import hellaswag_items
from gpt2_jax.evaluation.hellaswag_items import Item, read_items, validation_file

LINE = {
    "ind": 24,
    "activity_label": "Walking the dog",
    "ctx_a": "A man has a dog.",
    "ctx_b": "the dog",
    "ctx": "A man has a dog. the dog",
    "endings": ["barks", "reads", "sings", "naps"],
    "label": 0,
}
ITEM = Item(**LINE | {"endings": ("barks", "reads", "sings", "naps")})
WHOLE = ("ctx",)
PARTS = ("activity_label", "ctx_a", "ctx_b")
DATA = b"the validation set, as it were\n"
PACKED = gzip.compress(DATA, mtime=0)
OTHER = gzip.compress(b"other", mtime=0)


def write(path, *lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def line(**changes):
    """A line of the file; a field of Ellipsis is left out."""
    return json.dumps({name: v for name, v in {**LINE, **changes}.items() if v is not ...})


LINES = gzip.compress(line().encode(), mtime=0)


def refusal(path, **arguments):
    with pytest.raises(UserError) as raised:
        read_items(path, **arguments)
    message = str(raised.value)
    assert message.isprintable()  # so it is one line
    return message


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("name", ["items.jsonl", "items.jsonl.gz"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n \t\n"])
def test_items_are_read_whatever_the_name_and_the_wrapping(tmp_path, pack, name, mark, end):
    text = mark + "\n".join(line(label=label) for label in (2, 0, 1)) + end
    path = tmp_path / name
    path.write_bytes(pack(text.encode()))
    items = read_items(path)
    assert items == [ITEM._replace(label=label) for label in (2, 0, 1)]
    assert read_items(path, limit=2) == items[:2]
    assert read_items(path, limit=9) == items


def test_text_is_left_as_it_is(tmp_path):
    """Spaces, line separators that are none of the file's, and signs beyond the first plane."""
    odd = " \u2028 caf\u00e9\n\x85 \U0001f415 "
    texts = dict.fromkeys(hellaswag_items.TEXT_FIELDS, odd)
    for escaped in (True, False):
        record = LINE | texts | {"endings": [odd] * 4}
        path = write(tmp_path / "items.jsonl", json.dumps(record, ensure_ascii=escaped))
        assert read_items(path) == [Item(**texts, endings=(odd,) * 4, label=0, ind=24)]


@pytest.mark.parametrize("absent", [..., None])
def test_only_the_fields_that_are_asked_for_must_be_there(tmp_path, absent):
    without_parts = line(**dict.fromkeys(PARTS, absent), ind=absent)
    path = write(tmp_path / "items.jsonl", without_parts)
    assert read_items(path, fields=WHOLE) == [
        ITEM._replace(activity_label="", ctx_a="", ctx_b="", ind=None)
    ]
    assert "line 1: activity_label=None must be a text, not empty" in refusal(path, fields=PARTS)
    path = write(tmp_path / "items.jsonl", line(ctx=absent))
    assert read_items(path, fields=PARTS) == [ITEM._replace(ctx="")]
    assert "line 1: ctx=None must be a text, not empty" in refusal(path)


def test_a_context_may_lack_its_second_part(tmp_path):
    path = write(tmp_path / "items.jsonl", line(ctx_b=""))
    assert read_items(path) == [ITEM._replace(ctx_b="")]


def test_a_field_that_does_not_exist_is_a_bug(tmp_path):
    with pytest.raises(ValueError, match="context"):
        read_items(tmp_path / "items.jsonl", fields=("context",))


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ("{", " is not JSON: '{'"),
        ("[" * 99_999, " is not JSON: '[[["),
        ("[1]", " is not a JSON object: [1]"),
        ('"text"', " is not a JSON object: 'text'"),
        *(
            (line(**{name: value}), f": {name}={value!r} must be a text, not empty")
            for name in ("ctx", "ctx_a", "activity_label")
            for value in ("", 5, None, ["a"])
        ),
        (line(ctx=...), ": ctx=None must be a text, not empty"),
        (line(ctx_b=...), ": ctx_b=None must be a text;"),
        (line(ctx_b=5), ": ctx_b=5 must be a text;"),
        (line(ctx="a\n\ud800"), r": ctx='a\n\ud800' must be Unicode, but character 2 is '\ud800'"),
        (line(ctx_b="\udc00"), r": ctx_b='\udc00' must be Unicode, but character 0"),
        (line(endings=["a", "b", "\ud83d", "d"]), r": endings[2]='\ud83d' must be Unicode"),
        (line(endings=["a", "b", "c"]), ": endings=['a', 'b', 'c'] must be 4 texts"),
        (line(endings=list("abcde")), ": endings=['a', 'b', 'c', 'd', 'e'] must be 4 texts"),
        (line(endings=...), ": endings=None must be 4 texts"),
        (line(endings="abcd"), ": endings='abcd' must be 4 texts"),
        (line(endings=["a", "b", "c", 1]), ": endings[3]=1 must be a text, not empty"),
        (line(endings=["a", "", "c", "d"]), ": endings[1]='' must be a text, not empty"),
        *(
            (line(label=value), f": label={value!r} must be a whole number from 0 to 3")
            for value in (4, -1, "4", "x", "", True, 1.0, None, float("nan"))
        ),
        *(
            (line(ind=value), f": ind={value!r} must be a whole number, or left out")
            for value in ("24", True, 2.5)
        ),
    ],
)
def test_a_bad_line_is_told_with_file_and_number(tmp_path, bad, complaint):
    path = write(tmp_path / "items.jsonl", line(), bad, line())
    message = refusal(path)
    assert message.startswith(f"{path}, line 2{complaint}")
    assert message.endswith("; take the file from github.com/rowanz/hellaswag")
    assert read_items(path, limit=1) == [ITEM]


def test_fields_that_are_not_asked_for_are_texts_all_the_same(tmp_path):
    path = write(tmp_path / "items.jsonl", line(ctx_a=5))
    assert "line 1: ctx_a=5 must be a text;" in refusal(path, fields=WHOLE)
    path = write(tmp_path / "items.jsonl", line(ctx_a="\ud800"))
    assert "line 1: ctx_a='\\ud800' must be Unicode" in refusal(path, fields=WHOLE)


@pytest.mark.parametrize(
    "bad", [line(ctx=["long"] * 99), line(label="9" * 999), "{" + "long " * 99]
)
def test_a_long_value_is_shortened(tmp_path, bad):
    path = write(tmp_path / "items.jsonl", bad)
    message = refusal(path)
    assert "..." in message
    assert len(message) < len(str(path)) + 200


@pytest.mark.parametrize("blank", ["", " \t"])
def test_a_blank_line_is_refused_if_items_follow(tmp_path, blank):
    path = write(tmp_path / "items.jsonl", line(), blank, blank, line())
    assert f"{path}, line 2 is blank, and items follow; take" in refusal(path)
    assert read_items(path, limit=1) == [ITEM]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_byte_that_is_not_utf8_is_told_with_its_line(tmp_path, pack):
    path = tmp_path / "items.jsonl"
    path.write_bytes(pack(line().encode() + b'\n{"ctx": "\xff"}\n'))
    expected = f"{path}, line 2 is not UTF-8: byte 0xff at offset 9 of the line; take"
    assert expected in refusal(path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "{} is empty"),
        (b"\n \n", "{} is empty"),
        (gzip.compress(b"", mtime=0), "{} is empty"),
        (LINES[:-9], "cannot read {}: Compressed file ended"),
        (LINES[:5], "cannot read {}: Compressed file ended"),
        (LINES[:10] + b"\xff" * 9, "cannot read {}: Error -3"),
        (LINES[:-8] + b"\0" * 8, "cannot read {}: CRC check failed"),
        (LINES + b"more", "cannot read {}: Not a gzipped file"),
        (None, "cannot read {}: No such file"),
    ],
)
def test_a_bad_file_is_told_with_its_name(tmp_path, content, complaint):
    path = tmp_path / "items.jsonl.gz"
    if content is not None:
        path.write_bytes(content)
    message = refusal(path)
    assert message.startswith(complaint.format(path))
    assert "give HellaSwag's hellaswag_val.jsonl" in message


def test_a_folder_is_no_file(tmp_path):
    assert f"cannot read {tmp_path}: Is a directory" in refusal(tmp_path)


@pytest.mark.parametrize("limit", [0, -1, 1.5, True])
def test_a_limit_that_is_no_count_is_refused(tmp_path, limit):
    assert f"limit={limit}" in refusal(write(tmp_path / "items.jsonl", line()), limit=limit)


class Site(http.server.BaseHTTPRequestHandler):
    """Serves `DATA`, well or badly, by the path's name."""

    def do_GET(self):
        self.server.requests.append(self.path)
        body = {"/packed": PACKED, "/other": b"something else", "/cut": PACKED[:-3]}.get(
            self.path, DATA
        )
        self.send_response({"/gone": 404, "/broken": 503}.get(self.path, 200))
        self.send_header("Content-Length", str(len(body) + 7 * (self.path == "/interrupted")))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Nothing on stderr."""


@pytest.fixture(scope="module")
def site(serve):
    with serve(Site) as server:
        yield server


@pytest.fixture
def address(site, monkeypatch):
    """Where `DATA` is the validation set, and no proxy in between."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(hellaswag_items, "VALIDATION_SHA256", hashlib.sha256(DATA).hexdigest())
    site.requests.clear()
    return f"http://127.0.0.1:{site.server_port}"


def no_file(file, url):
    """What `validation_file` complains of."""
    with pytest.raises(UserError) as raised:
        validation_file(file, url)
    assert str(raised.value).isprintable()
    return str(raised.value)


@pytest.mark.parametrize("name", ["plain", "packed"])
def test_the_validation_set_is_downloaded_once(address, site, tmp_path, name):
    file = tmp_path / "new" / "data" / "items.jsonl"
    for _ in range(2):
        assert validation_file(file, f"{address}/{name}") == file
        assert file.read_bytes() == DATA
    assert list(file.parent.iterdir()) == [file]
    assert site.requests == [f"/{name}"]


@pytest.mark.parametrize("content", [DATA, PACKED])
@pytest.mark.parametrize("name", ["items.jsonl", "items.jsonl.gz"])
def test_a_copy_that_is_there_is_taken(address, site, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert validation_file(tmp_path / "items.jsonl", address) == tmp_path / name
    assert site.requests == []


@pytest.mark.parametrize("content", [b"", b"other", OTHER, PACKED[:-3]])
@pytest.mark.parametrize("name", ["items.jsonl", "items.jsonl.gz"])
def test_a_copy_that_is_something_else_is_left_and_told(address, site, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    message = no_file(tmp_path / "items.jsonl", address)
    assert message.startswith(f"{tmp_path / name} is not HellaSwag's validation set: its sha256")
    assert message.endswith(
        f", not {hashlib.sha256(DATA).hexdigest()}; delete it to download it again, or name it "
        f"with --data to score it as it is"
    )
    assert (tmp_path / name).read_bytes() == content
    assert site.requests == []


def test_a_copy_that_cannot_be_read_is_told(address, tmp_path):
    (tmp_path / "items.jsonl").mkdir()
    (tmp_path / "file").touch()
    for name, reason in (("items.jsonl", "Is a directory"), ("file/items", "Not a directory")):
        message = no_file(tmp_path / name, address)
        assert message.startswith(f"cannot read {tmp_path / name}: {reason}; ")
        assert message.endswith("or name another file with --data")


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("gone", "cannot download {} (HTTP Error 404: Not Found)"),
        ("broken", "cannot download {} (HTTP Error 503: Service Unavailable)"),
        ("interrupted", "cannot download {} (IncompleteRead"),
        ("other", "{} is not HellaSwag's validation set: its sha256 is "),
        ("cut", "{} is not HellaSwag's validation set: its sha256 is "),
        ("a name", "cannot download {} (URL can't contain control characters"),
    ],
)
def test_nothing_is_left_of_a_bad_download(address, tmp_path, name, complaint):
    message = no_file(tmp_path / "data" / "items.jsonl", f"{address}/{name}")
    assert message.startswith(complaint.format(f"{address}/{name}"))
    assert message.endswith("; fetch it elsewhere and pass it with --data")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("address")
def test_a_site_out_of_reach_is_told(tmp_path):
    with contextlib.closing(socket.socket()) as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/"
        message = no_file(tmp_path / "items.jsonl", url)
    assert message.startswith(f"cannot download {url} (<urlopen error ")
    assert "refused" in message
    assert message.endswith("; fetch it elsewhere and pass it with --data")


@pytest.mark.usefixtures("address")
@pytest.mark.parametrize("url", ["file://{}", "ftp://127.0.0.1{}", "{}", "", "http:{}"])
def test_only_the_web_is_asked(tmp_path, url):
    source = tmp_path / "source.jsonl"
    source.write_bytes(DATA)
    message = no_file(tmp_path / "items.jsonl", url.format(source))
    assert "an address must begin with http:// or https://; fetch it elsewhere" in message
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.usefixtures("address")
@pytest.mark.parametrize(
    "url", ["http://", "http://[1", "http://127.0.0.1:x/", "http://a\u20ac\ud800/"]
)
def test_an_address_that_is_none_is_told(tmp_path, url):
    with pytest.raises(UserError, match=r"^cannot download http://.* \(.*\); fetch it elsewhere"):
        validation_file(tmp_path / "items.jsonl", url)


def test_a_folder_that_cannot_be_written_is_told(address):
    file = Path("/proc/nowhere/items.jsonl")  # not even root may make it
    message = no_file(file, f"{address}/plain")
    assert message.startswith(f"cannot write {file}: ")
    assert message.endswith("can be written, or fetch it elsewhere and pass it with --data")


def test_a_full_disk_leaves_nothing(address, tmp_path, monkeypatch):
    def write_bytes(path, _):
        path.touch()
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    file = tmp_path / "items.jsonl"
    assert f"cannot write {file}: No space left on device;" in no_file(file, f"{address}/plain")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif("GPT2_JAX_SHARED" not in os.environ, reason="GPT2_JAX_SHARED is not set")
def test_the_validation_set_is_found_and_read_whole():
    folder = Path(os.environ["GPT2_JAX_SHARED"]) / "data"
    if not (folder / "hellaswag_val.jsonl.gz").is_file():
        pytest.skip(f"{folder / 'hellaswag_val.jsonl.gz'} is absent")
    path = validation_file(folder / "hellaswag_val.jsonl", "no address: it is there")
    assert path == folder / "hellaswag_val.jsonl.gz"
    items = read_items(path)
    assert len(items) == 10_042
    assert items[0] == Item(
        activity_label="Roof shingle removal",
        ctx_a="A man is sitting on a roof.",
        ctx_b="he",
        ctx="A man is sitting on a roof. he",
        endings=(
            "is using wrap to wrap a pair of skis.",
            "is ripping level tiles off.",
            "is holding a rubik's cube.",
            "starts pulling up roofing on a roof.",
        ),
        label=3,
        ind=24,
    )
    assert read_items(path, limit=3) == items[:3]
    # ActivityNet's 3,243 items have a second part, WikiHow's none.
    assert sum(item.ctx_b != "" for item in items) == 3243


def test_a_label_may_be_a_digit_as_in_the_hubs_copy(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps({**LINE, "label": "2"}))
    assert [item.label for item in read_items(path)] == [2]
