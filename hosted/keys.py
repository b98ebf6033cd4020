"""Where the key of the hosted service comes from, and how it is kept out of everything that is written or shown.

Order: FAL_KEY, then FAL_KEY_ID with FAL_KEY_SECRET, then a file that only its owner may read.
"""

import hashlib
import logging
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from ..pulid.errors import MissingKey

PLACEHOLDERS = {"YOUR_FAL_KEY", "YOUR_API_KEY"}  # as fal's page prints them
LINE = re.compile(r"""^\s*FAL_KEY\s*=\s*["']?([^"'#]*)["']?\s*(?:#.*)?$""", re.MULTILINE)
AUTHORIZATION = re.compile(
    r"(?i)(authorization\W{1,4}(?:key |bearer )?|\bkey (?=[\w-]{6,}:)|\bbearer (?=[\w.-]{20,}))[^\s'\",]+"
)
HIDDEN = "[hidden]"
LOGGERS = (__package__, "aiohttp.client", "aiohttp.internal", "asyncio")
SHORTEST_PART = 6  # characters; hiding shorter parts would hide words


class Key:
    """A key that shows itself in one place alone, the header of a request."""

    __slots__ = ("_value",)

    def __init__(self, value: str):
        if not value.isascii() or not value.isprintable() or " " in value:
            raise MissingKey(
                "The key of the hosted service holds spaces or characters that no key has. Copy it again, as id:secret."
            )
        self._value = value

    def __repr__(self) -> str:
        return f"Key({HIDDEN})"

    def __reduce__(self):
        raise TypeError("A key is never written anywhere.")

    @property
    def header(self) -> dict[str, str]:
        return {"Authorization": f"Key {self._value}"}

    @property
    def account(self) -> str:
        """Tells accounts apart without giving anything of the key away."""
        return hashlib.sha256(f"pulid account {self._value.partition(':')[0]}".encode()).hexdigest()

    def hide(self, text: str) -> str:
        """The text without the key and its parts."""
        for part in (self._value, *self._value.split(":")):
            if len(part) >= SHORTEST_PART:
                text = text.replace(part, HIDDEN)
        return text


class QuietFilter(logging.Filter):
    """Takes the key, and whatever else looks like an authorization, out of every record of a logger."""

    def __init__(self, key: Key):
        super().__init__()
        self.key = key

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = self._hide(record.getMessage()), None
        if record.exc_info:
            record.exc_text = self._hide(logging.Formatter().formatException(record.exc_info))
        return True

    def _hide(self, text: str) -> str:
        return AUTHORIZATION.sub(rf"\1{HIDDEN}", self.key.hide(text))


def quieten(key: Key) -> None:
    """Keep this key out of what this package and the HTTP library under it log; the key before it is forgotten."""
    for logger in map(logging.getLogger, LOGGERS):
        for known in [known for known in logger.filters if isinstance(known, QuietFilter)]:
            logger.removeFilter(known)
        logger.addFilter(QuietFilter(key))


def find_key(environ: Mapping[str, str], file: Path) -> Key:
    """The first usable key. A placeholder counts as none, so it hides no key that comes after it.

    environ  the environment; PULID_FAL_KEY_FILE in it names a file in place of `file`
    file     where the key file is by default

    Raises MissingKey, which says where a key was looked for.
    """
    file = Path(environ.get("PULID_FAL_KEY_FILE") or file)
    pair = environ.get("FAL_KEY_ID", "").strip(), environ.get("FAL_KEY_SECRET", "").strip()
    for value in (environ.get("FAL_KEY", ""), ":".join(pair) if all(pair) else "", _read(file)):
        if (value := value.strip()) and value not in PLACEHOLDERS:
            return Key(value)
    raise MissingKey(
        "The hosted service needs a key, and none was found. Set the environment variable FAL_KEY before ComfyUI "
        f'starts, or put the line FAL_KEY = "id:secret" into {_place(file)}, readable by you alone. '
        "Keys are made at fal.ai/dashboard/keys; one of scope API is enough."
    )


def _read(file: Path) -> str:
    if not file.is_file():
        return ""
    if os.name == "posix" and file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise MissingKey(
            f"Others on this machine can read {_place(file)}. Make it yours alone: chmod 600, then run again."
        )
    try:
        found = LINE.search(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        raise MissingKey(f'{_place(file)} cannot be read. It is a text with the line FAL_KEY = "id:secret".') from None
    return found[1] if found else ""


def _place(file: Path) -> str:
    """The end of a path: enough to find it, without the name of who is logged in."""
    return "/".join(("…", *file.parts[-3:]))
