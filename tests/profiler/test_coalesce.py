"""The coalescing writer: few writes, the last value always."""

import threading
import time

from kvserve_profiler.coalesce import Coalescer


def test_the_last_value_is_written_and_few_others() -> None:
    """Many values at once become two writes: one at once, one at the end."""
    written: list[int] = []
    with Coalescer[int](written.append, interval_s=60, on_error=lambda _: None) as writer:
        for value in range(1000):
            writer.put(value)
            if value == 0:
                while not written:
                    time.sleep(0.001)
    assert written == [0, 999]


def test_a_value_waits_no_longer_than_the_interval() -> None:
    """A later value is written by itself after the interval."""
    done = threading.Event()

    def write(value: int) -> None:
        if value == 2:
            done.set()

    with Coalescer[int](write, interval_s=0.05, on_error=lambda _: None) as writer:
        writer.put(1)
        time.sleep(0.01)
        writer.put(2)
        assert done.wait(5)


def test_a_failed_write_is_reported_and_tried_again() -> None:
    """An error does not stop the writer, and the value is not lost."""
    errors: list[Exception] = []
    written: list[str] = []

    def write(value: str) -> None:
        if len(errors) < 2:
            raise OSError("not now")
        written.append(value)

    with Coalescer[str](write, interval_s=0.01, on_error=errors.append) as writer:
        writer.put("value")
        for _ in range(500):
            if written:
                break
            time.sleep(0.01)
    assert written == ["value"]
    assert [str(error) for error in errors] == ["not now", "not now"]
