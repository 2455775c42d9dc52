"""The pods that `bench_push` plays, against a controller in this process."""

import asyncio
import json
from typing import Any

import pytest

import controller_profiles as profiles
from bench_push import Controller as Process
from controller_kvserve import policy
from kvserve_controller.controller import Controller
from kvserve_controller.metrics import Metrics
from kvserve_controller.server import Address, grpc_server, now
from kvserve_controller.source import Entry
from podclient import until
from push_pods import Fleet, Settings


def apply(controller: Controller, budget_bp: int) -> None:
    """Give a controller the benchmark's policy with a budget."""
    made = policy({"default": budget_bp})
    controller.apply({made.key: Entry(policy=made, pareto=profiles.cpu(), generation=1)})


async def test_pods_answer_and_come_back(capsys: pytest.CaptureFixture[str]) -> None:
    """All pods answer each table, tell when all have, and come back with what they hold."""
    controller = Controller(prior_bytes_per_s=125e6, now=now, metrics=Metrics())
    apply(controller, 100)
    events: list[dict[str, Any]] = []

    def said() -> int:
        events.extend(json.loads(line) for line in capsys.readouterr().out.splitlines())
        return len(events)

    async with grpc_server(Address(host="127.0.0.1", port=0), controller) as port:
        fleet = Fleet(
            Settings(f"127.0.0.1:{port}", 0.05, 0.1, 0.1),
            [(f"pod{n}", "Decode" if n % 2 else "Prefill") for n in range(4)],
        )
        tasks = [asyncio.create_task(pod.run()) for pod in fleet.pods]
        await until(lambda: said() == 1)
        apply(controller, 10)
        await until(lambda: said() == 2)
        for pod in fleet.pods:
            pod.drop()
        await until(lambda: said() == 3)
        fleet.closed = True
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    first, second, third = ([*event["version"]] for event in events)
    assert first < second == third
    assert [event["lowered"] for event in events] == [0, 0, 0]


def test_records_of_the_controllers_log(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Events are found by version, with their time; other lines of the log are passed over."""
    process = Process(tmp_path_factory.mktemp("push"))
    lines = [
        {
            "message": "answered",
            "time": "2026-01-01T00:00:01.500+00:00",
            "audit": {"version": "1.2"},
        },
        {"message": "listening", "time": "2026-01-01T00:00:00.000+00:00"},
    ]
    process.log.write_text("no JSON\n" + "".join(json.dumps(line) + "\n" for line in lines))
    assert process.records("answered") == {"1.2": {"version": "1.2", "at_s": 1767225601.5}}
