"""Real vLLM servers with our connector, on a tiny random model made on the fly."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORDS = 512


def free_port() -> int:
    """Return a port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def make_model(folder: Path) -> Path:
    """Write a random Llama of 4 layers; see `write_tokenizer`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    write_tokenizer(folder)
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        # large enough that the next word depends on the whole prompt
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer whose tokens are the words ``w0`` to ``w511``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{index}": index for index in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)


def make_prompt(tokens: int, seed: int) -> str:
    """Return a prompt of so many tokens; another seed gives other words from the first on."""
    return " ".join(f"w{(seed * 7919 + index * 104_729 + 13) % WORDS}" for index in range(tokens))


@dataclass
class Server:
    """A vLLM server as a process group.

    Attributes:
        port: Where it answers HTTP.
        log: Its output.
    """

    port: int
    log: Path
    process: subprocess.Popen[bytes]

    def wait_ready(self, timeout_s: float = 240) -> None:
        """Wait until it answers."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if self.process.poll() is not None:
                raise AssertionError(f"vLLM ended at start-up:\n{self.tail()}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(f"vLLM did not start within {timeout_s} s:\n{self.tail()}")

    def complete(self, prompt: str, max_tokens: int = 12, **extra: Any) -> dict[str, Any]:
        """Ask for a greedy completion and return the answer."""
        return post(
            self.port,
            "/v1/completions",
            {"model": "m", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0} | extra,
        )

    def text(self, prompt: str, max_tokens: int = 12, **extra: Any) -> str:
        """Return the completion's text."""
        text: str = self.complete(prompt, max_tokens, **extra)["choices"][0]["text"]
        return text

    def metrics(self, name: str) -> dict[str, float]:
        """Return a metric's values by its labels, as the Prometheus page shows them."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as page:
            lines = page.read().decode().splitlines()
        found: dict[str, float] = {}
        for line in lines:
            if line.startswith(name):
                labels, _, value = line[len(name) :].rpartition(" ")
                found[labels] = float(value)
        return found

    def count(self, name: str, *labels: str) -> float:
        """Return the sum of a metric over the label sets that hold all the given texts."""
        values = self.metrics(name)
        return sum(v for k, v in values.items() if all(label in k for label in labels))

    def tail(self, lines: int = 60) -> str:
        """Return the end of its output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def signal(self, number: int) -> None:
        """Send a signal to all its processes."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return

    def stop(self) -> None:
        """End it for good."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            self.process.wait(10)
        # workers that outlive their parent
        self.signal(signal.SIGKILL)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to start a server.

    Attributes:
        role: ``kv_producer``, ``kv_consumer`` or ``kv_both``.
        core: The one core it may use; None to leave it to the kernel.
        extra: Its ``kv_connector_extra_config``.
        prefix_caching: Keep blocks of finished requests for later ones.
        beside: Other connectors that run beside ours under vLLM's MultiConnector; none to run ours alone.
        arguments: More arguments, which override ours.
    """

    role: str
    core: int | None
    extra: Mapping[str, Any] = field(default_factory=dict)
    prefix_caching: bool = False
    beside: tuple[Mapping[str, Any], ...] = ()
    arguments: tuple[str, ...] = ()


def start(plan: Plan, model: Path, folder: Path) -> Server:
    """Start a server; `Server.wait_ready` waits for it."""
    port = free_port()
    transfer = {
        "kv_connector": "KVServeConnector",
        "kv_connector_module_path": "kvserve_connector.connector",
        "kv_role": plan.role,
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "listen_host": "127.0.0.1",
            "listen_port": 0,
            "advertise_host": "127.0.0.1",
        }
        | dict(plan.extra),
    }
    if plan.beside:
        transfer = {
            "kv_connector": "MultiConnector",
            "kv_role": plan.role,
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"connectors": [transfer, *map(dict, plan.beside)]},
        }
    env = os.environ | {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind" if plan.core is None else str(plan.core),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "PYTHONHASHSEED": "0",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    log = folder / f"{plan.role}-{port}.log"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(model), "--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--max-model-len", "2048", "--enforce-eager", "--seed", "0",
        "--kv-cache-memory-bytes", "67108864",
        "--enable-prefix-caching" if plan.prefix_caching else "--no-enable-prefix-caching",
        "--kv-transfer-config", json.dumps(transfer),
        *plan.arguments,
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=env,
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Server(port=port, log=log, process=process)


def prefill(producer: Server, prompt: str, **extra: Any) -> dict[str, Any]:
    """Do what a router does first: have the producer prefill; return its ``kv_transfer_params``."""
    params = {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "remote_engine_id": None,
        "remote_block_ids": None,
        "remote_host": None,
        "remote_port": None,
    }
    answer = producer.complete(prompt, max_tokens=1, kv_transfer_params=params, **extra)
    found: dict[str, Any] = answer["kv_transfer_params"]
    return found


def hand_over(
    producer: Server, consumer: Server, prompt: str, max_tokens: int = 12, **extra: Any
) -> str:
    """Do what a router does: prefill at one server, decode at the other; return the text."""
    params = prefill(producer, prompt, **extra)
    return consumer.text(prompt, max_tokens, kv_transfer_params=params, **extra)


def at_once(
    producer: Server,
    consumer: Server,
    prompt: str,
    where: Mapping[str, Any],
    max_tokens: int = 12,
    *,
    head_start_s: float = 0.0,
) -> str:
    """Do what a router does that sends a request to both servers at the same time; return the text.

    Args:
        producer: The prefill server.
        consumer: The decode server.
        prompt: The prompt.
        where: ``remote_host`` and ``remote_port`` of the prefill server's transfers.
        max_tokens: Tokens to generate.
        head_start_s: Seconds that the decode request is earlier.
    """
    name = {"transfer_id": f"xfer-{uuid.uuid4()}"}
    decode = {"do_remote_decode": False, "do_remote_prefill": True} | name | dict(where)
    wish = {"do_remote_decode": True, "do_remote_prefill": False} | name
    with ThreadPoolExecutor(1) as pool:
        text = pool.submit(consumer.text, prompt, max_tokens, kv_transfer_params=decode)
        time.sleep(head_start_s)
        producer.complete(prompt, max_tokens=1, kv_transfer_params=wish)
        return text.result(60)


def post(port: int, path: str, body: Mapping[str, Any], timeout_s: float = 120) -> dict[str, Any]:
    """Post JSON and return the JSON that is answered."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        data=json.dumps(dict(body)).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            value: dict[str, Any] = json.loads(answer.read())
            return value
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{path}: {error.code} {error.read()[:500]!r}") from error
