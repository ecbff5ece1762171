"""JSON that others wrote, read within bounds, and its values as a message of one line quotes them.

Whatever a file holds, ValueError is all that reading it can raise, but for OSError where the machine does not read it.
`check_no_pointer` is for files that are no JSON too.
Imports nothing of ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
MOST_BYTES = 2**25  # of a file of settings; the largest index of a checkpoint that is known to us has 9 MB
MOST_VALUES = 2**24  # in a text: `[[],[],...` takes 25 times its own size once it is parsed
MOST_DEPTH = 64  # of lists and objects in one another: what comes after parsing may recurse too
MOST_QUOTED, MOST_MESSAGE = 80, 480  # characters; before a message stands a program's name


def read_object(path: Path, most: int = MOST_BYTES) -> dict[str, Any]:
    """The object that a JSON file holds.  Raises ValueError, with the path, for anything else."""
    if not path.is_file():  # a pipe could be waited for without end
        raise ValueError(f"{path} is missing or no file")
    try:
        if path.stat().st_size > most:
            raise ValueError(f"it has {path.stat().st_size / 2**20:,.0f} MB; at most {most >> 20} are read")
        value = parse(path.read_text(encoding="utf-8-sig"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds {shown(value)}")
    except ValueError as error:  # UnicodeDecodeError is one too
        raise ValueError(f"{path} is not a JSON object in UTF-8: {error}") from None
    return value


def parse(text: str) -> Any:
    """The value of a JSON text.  Its numbers may have 4,300 digits, or be infinite or NaN."""
    opened = text.count("[") + text.count("{")
    if opened + text.count(",") > MOST_VALUES:  # at least as many as there are values
        raise ValueError(f"it may hold more than {MOST_VALUES:,} values")
    try:
        value = json.loads(text)
    except RecursionError:
        value, deep = None, True
    else:
        deep = opened > MOST_DEPTH and _is_deeper(value, MOST_DEPTH)
    if deep:
        raise ValueError(f"lists and objects are nested more than {MOST_DEPTH} deep")
    if "\\ud" in text or "\\uD" in text:  # an escape may stand for half a character, which nothing can write
        _check_characters(value)
    return value


def _check_characters(value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a text in it holds half of a character, {shown(text[error.start])}") from None


def _is_deeper(value: Any, depth: int) -> bool:
    """Level by level, because to recurse is what must not be done here."""
    level = [value]
    for _ in range(depth + 1):
        level = [
            held
            for outer in level if isinstance(outer, list | dict)
            for held in (outer.values() if isinstance(outer, dict) else outer)
        ]  # fmt: skip
    return bool(level)


def check_no_pointer(path: Path) -> None:
    """Raises ValueError where git has left a pointer in the place of a large file, JSON or not, for want of git-lfs."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` there")


def shown(value: Any, most: int = MOST_QUOTED) -> str:
    """A value from outside as a message quotes it: its repr, which is shortened where it is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}... of {len(text):,} characters"


def shown_all(names: Iterable[str], most: int = 3 * MOST_QUOTED) -> str:
    """Names from outside as a message lists them."""
    text = ", ".join(map(repr, names))
    return text if len(text) <= most else f"{text[: most - 3]}... of {len(text):,} characters"


def one_line(message: str, most: int = MOST_MESSAGE) -> str:
    """A message as one printable line; a longer one loses its middle, because its ends say what and why."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(message.split()))
    kept = (most - 5) // 2
    return text if len(text) <= most else f"{text[:kept]} ... {text[-kept:]}"
