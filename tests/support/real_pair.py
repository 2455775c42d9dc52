"""A pair of real vLLM servers with a controller, as tests use it."""

import json
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controller_process import ControllerProcess
from otlp_receiver import Receiver
from vllm_servers import Server

TIMEOUT_S = 8.0
LEASE_S = 6.0


@dataclass
class RealPair:
    """A producer and a consumer, their controller, their trace receiver, and where routers look up the producer."""

    model: Path
    folder: Path
    producer: Server
    consumer: Server
    controller: ControllerProcess
    receiver: Receiver
    bootstrap_port: int

    def failures(self, reason: str) -> float:
        """Return how many fetches failed for a reason."""
        return self.consumer.count(
            "vllm:kvserve_transfer_failures_total", 'direction="receive"', f'reason="{reason}"'
        )

    def sent(self, profile: str | None = None) -> float:
        """Return how many transfers were sent, with a profile or with any; the last of them counts a little later."""
        marks = [] if profile is None else [f'profile="{profile}"']
        return self.producer.count("vllm:kvserve_transfers_total", 'direction="send"', *marks)

    def fetched_tokens(self) -> float:
        """Return how many prompt tokens the consumer fetched instead of computing them."""
        return self.consumer.count(
            "vllm:prompt_tokens_by_source_total", 'source="external_kv_transfer"'
        )

    def leases(self, reason: str) -> float:
        """Return how many leases ended for a reason."""
        return self.producer.count("vllm:kvserve_leases_ended_total", f'reason="{reason}"')

    def transfers_at(self) -> dict[str, Any]:
        """Return where the producer serves transfers, as a router is told in a decode request."""
        with urllib.request.urlopen(
            f"http://127.0.0.1:{self.bootstrap_port}/query", timeout=5
        ) as answer:
            name = json.loads(answer.read())["0"]["engine_id"]
        host, _, port = name.rpartition("@")[2].rpartition(":")
        return {"remote_host": host, "remote_port": int(port)}

    def use(self, profile: str, timeout_s: float = 20) -> None:
        """Pin a profile, and wait until both servers have it."""
        self.controller.set_policy(control={"mode": "Pinned", "pinnedProfile": profile})
        deadline_s = time.monotonic() + timeout_s
        while not self._synced(profile):
            assert time.monotonic() < deadline_s, self.controller.status()
            time.sleep(0.2)

    def _synced(self, profile: str) -> bool:
        status = self.controller.status().get("default/chat", {})
        targets = status.get("targets", [])
        counts = [target["connected"] == 1 == target["synced"] for target in targets]
        # the profile may be in use already, by another policy than this
        seen = {condition["observedGeneration"] for condition in status.get("conditions", [])}
        return (
            seen == {self.controller.generation}
            and status.get("activeProfile", {}).get("name") == profile
            and counts == [True, True]
        )
