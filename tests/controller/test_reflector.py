"""Following an API server that misbehaves; a scripted HTTP server plays one, because a real one won't on demand."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from kvserve_controller import kube_client, reflector
from kvserve_controller.kube_client import Collection, KubeClient
from kvserve_controller.kubeconfig import Access
from kvserve_controller.reflector import Reflector
from podclient import until


def item(name: str, version: int) -> dict[str, Any]:
    """Return an object."""
    metadata = {"namespace": "n", "name": name, "resourceVersion": str(version)}
    return {"metadata": metadata}


class Script:
    """An API server whose answers are laid down: one list after another, one watch after another.

    Attributes:
        lists: What each list answers: objects, or an HTTP status. The last one stays.
        watches: The events of each watch; None as the last one keeps it open. Without one left: open and silent.
        asked: The resource version each watch asked for.
    """

    def __init__(self, lists: list[Any], watches: list[list[Any]]) -> None:
        self.lists = lists
        self.watches = watches
        self.asked: list[str] = []
        self.listed = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer a list or a watch."""
        if "watch" not in request.query:
            self.listed += 1
            found = self.lists.pop(0) if len(self.lists) > 1 else self.lists[0]
            if isinstance(found, int):
                return web.json_response({"message": "scripted"}, status=found)
            metadata = {"resourceVersion": str(100 + self.listed)}
            return web.json_response({"items": found, "metadata": metadata})
        self.asked.append(request.query["resourceVersion"])
        response = web.StreamResponse()
        await response.prepare(request)
        for event in self.watches.pop(0) if self.watches else [None]:
            if event is None:
                await asyncio.sleep(60)
            line = event if isinstance(event, bytes) else json.dumps(event).encode() + b"\n"
            await response.write(line)
        return response


@pytest.fixture
async def follow(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    """Return what starts a scripted server and a reflector of it."""
    monkeypatch.setattr(reflector, "LEAST_BACKOFF_S", 0.01)
    monkeypatch.setattr(reflector, "MOST_BACKOFF_S", 0.02)
    monkeypatch.setattr(kube_client, "SILENCE_S", 0.5)
    cleanups: list[Any] = []

    async def start(script: Script) -> Reflector:
        app = web.Application()
        app.router.add_get("/{path:.*}", script.answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        client = KubeClient(Access(url=f"http://127.0.0.1:{port}", tls=None))
        await client.__aenter__()
        made = Reflector(client, Collection(prefix="/api/v1", plural="things"), lambda: None)
        task = asyncio.create_task(made.run())
        cleanups.extend([(task, client, runner)])
        return made

    yield start
    for task, client, runner in cleanups:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await client.__aexit__(None, None, None)
        await runner.cleanup()


def event(kind: str, name: str, version: int) -> dict[str, Any]:
    """Return an event."""
    return {"type": kind, "object": item(name, version)}


GONE = {"type": "ERROR", "object": {"code": 410, "reason": "Expired", "message": "too old"}}


async def test_events_and_bookmarks(follow: Any) -> None:
    """Events change the copy; the next watch goes on from the last bookmark, without a list."""
    script = Script(
        [[item("a", 1), item("b", 2)]],
        [
            [
                event("ADDED", "c", 102),
                event("DELETED", "a", 103),
                event("BOOKMARK", "", 150),
            ]
        ],
    )
    subject = await follow(script)
    await until(lambda: len(script.asked) == 2)
    assert sorted(name for _, name in subject.objects) == ["b", "c"]
    assert script.asked == ["101", "150"]
    assert script.listed == 1


@pytest.mark.parametrize(
    "trouble",
    [
        pytest.param([GONE], id="gone"),
        pytest.param([b"{not json\n"], id="garbage"),
        pytest.param([{"type": "ERROR", "object": {"code": 500}}], id="error"),
        pytest.param([event("ADDED", "x", 102), None], id="silence"),
    ],
)
async def test_trouble_means_listing_again(follow: Any, trouble: list[Any]) -> None:
    """After a watch that is too old, broken or silent the collection is listed again: nothing is missed."""
    script = Script([[item("a", 1)], [item("b", 2)]], [trouble])
    subject = await follow(script)
    await until(lambda: script.listed == 2 and len(script.asked) == 2)
    assert [name for _, name in subject.objects] == ["b"]
    assert script.asked == ["101", "102"]


@pytest.mark.parametrize("status", [403, 429, 500, 503])
async def test_refused_list_is_tried_again(follow: Any, status: int) -> None:
    """A server that refuses for a while is asked again until it answers, and counts as followed meanwhile."""
    script = Script([status, status, [item("a", 1)]], [])
    subject = await follow(script)
    began_s = subject.alive_s
    assert not subject.synced
    await until(lambda: subject.synced)
    assert script.listed == 3
    assert subject.alive_s > began_s
