"""Tiny Shakespeare: 40,000 lines of his plays in one file, as Karpathy's char-rnn had them.

GPT-2's BPE makes 338,025 tokens of it.
"""

import hashlib
import urllib.request
from pathlib import Path

from gpt2_jax.errors import UserError
from gpt2_jax.files import read_text, written_beside

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def read_shakespeare(file: Path) -> str:
    """Reads a copy of the file.

    Raises:
      UserError: if it is not the file, byte for byte.
    """
    text = read_text(file)
    _check(text.encode(), str(file))
    return text


def download_shakespeare(file: Path, url: str = URL) -> None:
    """Downloads the file to `file`, unless it is already there.

    Raises:
      UserError: if the address cannot be reached, or gives another file; nothing is left then.
    """
    if file.exists():
        return
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            data = response.read()
    except OSError as error:
        raise UserError(
            f"cannot download {url} ({error}); fetch it elsewhere and pass it with --input"
        ) from None
    _check(data, url)
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(file) as scratch:
        scratch.write_bytes(data)


def _check(data: bytes, source: str) -> None:
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256:
        raise UserError(
            f"{source} is not tiny Shakespeare: its sha256 is {digest}, not {SHA256}; "
            f"for other text use scripts/prepare_custom_text.py"
        )
