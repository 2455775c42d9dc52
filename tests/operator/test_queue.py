"""The work queue: one worker a key, one place in the line, and patience that grows."""

import asyncio
import random

from kvserve_operator.queue import MAX_BACKOFF_S, KeyedQueue


async def test_a_key_waits_once() -> None:
    """A key that is added often is handed out once."""
    queue: KeyedQueue[str] = KeyedQueue()
    for key in ("a", "b", "a", "a"):
        queue.add(key)
    assert [await queue.get(), await queue.get()] == ["a", "b"]
    queue.add_after("c", 0.01)
    assert await asyncio.wait_for(queue.get(), 1) == "c"


async def test_a_key_is_worked_on_by_one() -> None:
    """A key that is added while it is worked on comes again when that is done, and not before."""
    queue: KeyedQueue[str] = KeyedQueue()
    queue.add("a")
    assert await queue.get() == "a"
    queue.add("a")
    queue.add("b")
    assert await queue.get() == "b"
    queue.done("a")
    assert await asyncio.wait_for(queue.get(), 1) == "a"


async def test_the_earliest_delay_counts() -> None:
    """Of two delays of a key the shorter one counts, in either order."""
    queue: KeyedQueue[str] = KeyedQueue()
    queue.add_after("a", 60)
    queue.add_after("a", 0.01)
    queue.add_after("b", 0.01)
    queue.add_after("b", 60)
    got = {await asyncio.wait_for(queue.get(), 1), await asyncio.wait_for(queue.get(), 1)}
    assert got == {"a", "b"}
    queue.close()


async def test_backoff_doubles_up_to_a_limit() -> None:
    """Delays double with each failure in a row, stay below a limit, and begin anew after a success."""
    queue: KeyedQueue[str] = KeyedQueue(rng=random.Random(1))
    delays = [queue.failed("a") for _ in range(12)]
    for number, delay_s in enumerate(delays):
        nominal_s = min(MAX_BACKOFF_S, 2.0**number)
        assert 0.8 * nominal_s <= delay_s <= 1.2 * nominal_s
    queue.succeeded("a")
    assert queue.failed("a") <= 1.2
    assert queue.failed("b", at_least_s=7) == 7
    queue.close()
