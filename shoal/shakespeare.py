"""Lines of Shakespeare's plays, and who speaks them.

The text `tinyshakespeare` of https://github.com/karpathy/char-rnn (data/tinyshakespeare/input.txt): 40000 lines
from the plays, in the public domain, 65 different characters. An empty line parts the speeches, and the first line of
each is `SPEAKER:`. LEAF (arXiv:1812.01097) keys by play and role; here there are no titles, so that two roles of one
name are one speaker.
"""

from __future__ import annotations

from pathlib import Path

from shoal import files
from shoal.errors import DataError
from shoal.files import Remote

NAME = "tinyshakespeare"
URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/"
    "data/tinyshakespeare/input.txt"
)
FILE, SIZE = "tinyshakespeare.txt", 1115394
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def located(given: str | Path) -> Path:
    """The folder of the text: a path, or "tinyshakespeare" for where `shoal.files` finds it or downloads it to."""
    remote = Remote(FILE, URL, SIZE, _check)
    return files.folder(given, NAME, lambda place: files.find(place, FILE) is not None, [remote])


def text(folder: str | Path) -> str:
    """The whole text. Raises DataError where it is absent, or is another one."""
    there = Path(folder).expanduser()
    path = files.find(there, FILE)
    if path is None:
        raise DataError(
            f"{there} holds no {FILE} (nor .xz, .gz, .bz2): download it with --data {NAME}, or put {URL} there under "
            "that name."
        )
    raw = files.read(path)
    _check(raw, str(path))
    return raw.decode("ascii")


def speakers(whole: str) -> dict[str, str]:
    """Speaker -> all that they say, speech after speech, each with its line ends; by name. Raises DataError."""
    said: dict[str, list[str]] = {}
    for number, block in enumerate(whole.strip("\n").split("\n\n"), 1):
        who, _, words = block.strip("\n").partition("\n")
        if not who.endswith(":"):
            raise DataError(f"speech {number} begins {block[:30]!r}: its first line must be `SPEAKER:`.")
        said.setdefault(who[:-1], []).append(words + "\n")
    return {who: "".join(said[who]) for who in sorted(said)}


def _check(raw: bytes, where: str) -> None:
    files.check_sum(raw, SHA256, where, f"{NAME}'s")
