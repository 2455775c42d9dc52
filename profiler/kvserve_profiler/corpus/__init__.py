"""The built-in evaluation text; see the README beside it."""

from importlib.resources import files
from typing import Final

NAMES: Final = ("prose", "dialogue", "technical", "code")


def documents() -> tuple[str, ...]:
    """Return the texts, in a fixed order."""
    folder = files(__name__)
    return tuple((folder / f"{name}.txt").read_text(encoding="utf-8") for name in NAMES)
