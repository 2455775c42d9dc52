"""Reading untrusted JSON objects field by field, with errors that name the field.

`Fields` wraps one object; each getter checks type and range, and `done()` refuses keys nobody asked for, so that a
typo is an error and not a silently ignored wish.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Self

from kvserve_api.errors import SpecError

_MISSING: Any = object()


class Fields:
    """A strict reader of one JSON object.

    Attributes:
        path: Where the object stands in its document; the prefix of every error.
    """

    def __init__(self, value: Any, path: str = "", *, error: type[SpecError] = SpecError) -> None:
        self.path = path
        self._error = error
        if not isinstance(value, Mapping):
            raise error(path or "document", f"must be an object, got {type(value).__name__}")
        self._value: Mapping[str, Any] = value
        self._seen: set[str] = set()

    def at(self, key: str) -> str:
        """Return the path of a key, for errors."""
        return f"{self.path}.{key}" if self.path else key

    def fail(self, key: str, problem: str) -> SpecError:
        """Return the error to raise for a key."""
        return self._error(self.at(key), problem)

    def raw(self, key: str, default: Any = _MISSING) -> Any:
        """Return the value as it is; without a default the key is required."""
        self._seen.add(key)
        value = self._value.get(key, _MISSING)
        if value is _MISSING or value is None:
            if default is _MISSING:
                raise self.fail(key, "is required")
            return default
        return value

    def has(self, key: str) -> bool:
        """Tell whether the key is there and not null."""
        return self._value.get(key) is not None

    def string(
        self,
        key: str,
        default: Any = _MISSING,
        *,
        choices: Iterable[str] | None = None,
        min_length: int = 0,
        max_length: int = 4096,
    ) -> str:
        """Return a string, of so many characters and among ``choices`` if given."""
        value = self.raw(key, default)
        if value is default:
            return value  # type: ignore[no-any-return]
        if not isinstance(value, str):
            raise self.fail(key, f"must be a string, got {type(value).__name__}")
        if len(value) < min_length:
            raise self.fail(key, "must not be empty")
        if len(value) > max_length:
            raise self.fail(key, f"must have at most {max_length} characters, has {len(value)}")
        if choices is not None and value not in (allowed := list(choices)):
            raise self.fail(key, f"must be one of {', '.join(allowed)}, got {value!r}")
        return value

    def integer(
        self,
        key: str,
        default: Any = _MISSING,
        *,
        minimum: int | None = None,
        maximum: int | None = None,
    ) -> int:
        """Return an integer in a closed range."""
        value = self.raw(key, default)
        if value is default:
            return value  # type: ignore[no-any-return]
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(key, f"must be an integer, got {value!r}")
        self._check_range(key, value, minimum, maximum)
        return value

    def number(
        self,
        key: str,
        default: Any = _MISSING,
        *,
        minimum: float | None = None,
        maximum: float | None = None,
    ) -> float:
        """Return a finite number in a closed range, as float."""
        value = self.raw(key, default)
        if value is default:
            return value  # type: ignore[no-any-return]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(key, f"must be a number, got {value!r}")
        if not math.isfinite(value):
            raise self.fail(key, f"must be finite, got {value!r}")
        self._check_range(key, value, minimum, maximum)
        return float(value)

    def boolean(self, key: str, default: Any = _MISSING) -> bool:
        """Return true or false."""
        value = self.raw(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, f"must be true or false, got {value!r}")
        return value

    def child(self, key: str, default: Any = _MISSING) -> Self:
        """Return a reader of the object below a key."""
        return type(self)(self.raw(key, default), self.at(key), error=self._error)

    def children(self, key: str, default: Any = _MISSING, *, max_items: int = 4096) -> list[Self]:
        """Return a reader for each object of the list below a key."""
        return [
            type(self)(item, f"{self.at(key)}[{index}]", error=self._error)
            for index, item in enumerate(self.items(key, default, max_items=max_items))
        ]

    def items(self, key: str, default: Any = _MISSING, *, max_items: int = 4096) -> list[Any]:
        """Return the list below a key, of at most ``max_items``."""
        value = self.raw(key, default)
        if not isinstance(value, list | tuple):
            raise self.fail(key, f"must be a list, got {type(value).__name__}")
        if len(value) > max_items:
            raise self.fail(key, f"must have at most {max_items} items, has {len(value)}")
        return list(value)

    def mapping(self, key: str, default: Any = _MISSING) -> dict[str, Any]:
        """Return the object below a key as a dict, its contents unchecked."""
        value = self.raw(key, default)
        if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
            raise self.fail(key, f"must be an object, got {type(value).__name__}")
        return dict(value)

    def mapping_of(self) -> dict[str, Any]:
        """Return the whole object as a dict and count all its keys as read."""
        self._seen.update(self._value)
        return dict(self._value)

    def ignore(self, *keys: str) -> None:
        """Accept keys that are not read here."""
        self._seen.update(keys)

    def done(self) -> None:
        """Refuse what nobody asked for.

        Raises:
            SpecError: The object has a key that was not read.
        """
        unknown = sorted(set(self._value) - self._seen)
        if unknown:
            known = ", ".join(sorted(self._seen)) or "none"
            raise self.fail(unknown[0], f"is not known; known here: {known}")

    def _check_range(
        self, key: str, value: float, minimum: float | None, maximum: float | None
    ) -> None:
        if minimum is not None and value < minimum:
            raise self.fail(key, f"must be at least {minimum}, got {value}")
        if maximum is not None and value > maximum:
            raise self.fail(key, f"must be at most {maximum}, got {value}")
