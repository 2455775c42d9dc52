"""A writer for values of which only the latest matters, at most one write in a while."""

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Coalescer(Generic[T]):
    """Writes the latest value in a thread of its own; the last one always, when the block ends.

    A write that fails is retried with the next value, or after the same while, and reported; it never stops the work
    that the values are about.
    """

    def __init__(
        self,
        write: Callable[[T], None],
        *,
        interval_s: float,
        on_error: Callable[[Exception], None],
    ) -> None:
        self._write = write
        self._interval_s = interval_s
        self._on_error = on_error
        self._changed = threading.Condition()
        self._pending: list[T] = []
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="kvserve-coalescer", daemon=True)

    def __enter__(self) -> Self:
        """Start the thread."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Write what is left, once, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def put(self, value: T) -> None:
        """Hand over a value to write; it replaces one that was not yet written."""
        with self._changed:
            self._pending = [value]
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closing)
                pending, self._pending = self._pending, []
                closing = self._closing
            for value in pending:
                self._attempt(value, last=closing)
            if closing:
                return
            with self._changed:
                self._changed.wait_for(lambda: self._closing, timeout=self._interval_s)

    def _attempt(self, value: T, *, last: bool) -> None:
        try:
            self._write(value)
        except Exception as error:  # whatever a client raises, the measurements go on
            self._on_error(error)
            with self._changed:
                if not last and not self._pending:
                    self._pending = [value]
