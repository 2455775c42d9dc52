"""What is replayed: arrivals, links, profiles, and how the truth differs from what was profiled.

In every scenario, drawn by its seed: each profile's codec is faster or slower than profiled by up to half, partly
with its device and partly by itself; ratios are off by up to 8 %; single transfers scatter (10 % in codec time, 4 %
in ratio), and one in fifty is held up four times as long by its codec. Links scatter by 10 % around their course four
times a second and stall for .3 s about every 20 s.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Final

import controller_profiles as profiles
from controller_queue import Capacity, Work
from controller_traces import Traces
from kvserve_api.latency import StageCost
from kvserve_api.profile_set import NONE, ParetoSet, Profile
from kvserve_api.wire import KVLayout
from kvserve_connector.chunks import DEADLINE_TOKENS, Chunk, plan, range_tokens
from kvserve_connector.config import ConnectorConfig
from kvserve_connector.midway import common_step, follows
from kvserve_strategies import PRESETS, Pipeline
from pd_load import LENGTHS, WEIGHTS

GBIT: Final = 1e9 / 8
MB: Final = 1e6
CHUNK_BYTES: Final = 8 << 20
MOST_CHUNKS: Final = 16
"""More chunks change a pipeline's time by less than a sixteenth, and cost the replay in proportion."""
KIB: Final = 1024
LLAMA_8B: Final = 128 * KIB
QWEN_32B: Final = 256 * KIB
SMOLLM2: Final = 22.5 * KIB
"""Bytes of KV a token."""
SMOLLM2_LAYOUT: Final = KVLayout(layers=30, kv_heads=3, head_dim=64, dtype="bfloat16")
CHUNK_LAYERS: Final = ConnectorConfig().chunk_layers
"""Most layers of a chunk, as the connector has it by default."""
LEAST_TOKENS: Final = 32
PROMPT_TOKENS: Final = tuple(n for n, w in zip(LENGTHS, WEIGHTS, strict=True) for _ in range(w))
"""Lengths of prompts as often as ``make bench-pd`` has them."""
PAPER_TOKENS: Final = 14_000
PAPER_BUDGET_BP: Final = 300
"""The paper's profiler tolerates 3 %."""
STEP_S: Final = 0.25
STALL_S: Final = 0.3
STALL_EVERY_S: Final = 20.0
STALL_SHARE: Final = 0.02
MBIT: Final = 1e6 / 8
PERCENTILE: Final = 95
"""So many per cent of the transfers shall keep an objective."""
OBJECTIVE_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request whose KV is pulled."""

    at_s: float
    native_bytes: int
    workload: str = "default"


@dataclass(frozen=True, slots=True)
class Factors:
    """What a profile's costs are to be multiplied with to be true."""

    encode: float = 1.0
    decode: float = 1.0
    wire: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """One replay.

    Attributes:
        name: Its name.
        pareto: What was profiled.
        default: The profile that is used without any controller.
        budgets_bp: Quality budget of each workload class; always with ``default``.
        arrivals: The requests, by time.
        capacity: Of the link.
        rtt_s: Of the link.
        prior_bytes_per_s: What the controller is told to assume of an unmeasured link.
        truth: Factors of each profile.
        scatter: Factors of each arrival, whatever its profile.
        slow: A factor of encoding and one of decoding, by time.
        objective_s: Without it latency is minimised; with it quality is maximised, and `PERCENTILE` of the transfers
            shall take at most so many seconds.
        layout: Of the cache, where transfers are cut as the connector cuts them; else see `chunks_of`.
        fine: Whether they are cut as those that may change midway.
    """

    name: str
    pareto: ParetoSet
    default: str
    budgets_bp: Mapping[str, int]
    arrivals: tuple[Arrival, ...]
    capacity: Capacity
    rtt_s: float
    prior_bytes_per_s: float
    truth: Mapping[str, Factors]
    scatter: tuple[Factors, ...]
    slow: Callable[[float], tuple[float, float]] = field(default=lambda _: (1.0, 1.0))
    objective_s: float | None = None
    layout: KVLayout | None = None
    fine: bool = False

    @property
    def profiles(self) -> dict[str, Profile]:
        """The profiles by name."""
        return {profile.name: profile for profile in self.pareto.profiles("default")}

    def allowed(self, workload: str) -> list[Profile]:
        """Return the profiles within a class's quality budget."""
        return [p for p in self.profiles.values() if p.loss_upper_bp <= self.budgets_bp[workload]]

    def work(self, index: int, name: str) -> Work:
        """Return what an arrival truly asks of the servers under a profile."""
        arrival, profile = self.arrivals[index], self.profiles[name]
        mine, scatter = self.truth[name], self.scatter[index]
        encode, decode = self.slow(arrival.at_s)
        native = arrival.native_bytes
        wire = 1.0 if name == NONE else mine.wire * scatter.wire
        calls = self._calls(index, name)
        return Work(
            encode_s=_seconds(profile.encode, native, calls)
            * mine.encode
            * scatter.encode
            * encode,
            wire_bytes=native / profile.ratio * wire,
            decode_s=_seconds(profile.decode, native, calls)
            * mine.decode
            * scatter.decode
            * decode,
            chunks=chunks_of(native) if self.layout is None else len(self.plan(index, name)),
        )

    def plan(self, index: int, first: str) -> tuple[Chunk, ...]:
        """Return how the connector cuts an arrival that begins with a profile."""
        assert self.layout is not None
        tokens = self.arrivals[index].native_bytes // self.layout.native_bytes(1)
        return _cut(self.layout, tokens, first, tuple(self.profiles), self.fine)

    def _calls(self, index: int, name: str) -> float:
        """Return how many times as many chunks there are as groups of layers, of which costs were measured."""
        if self.layout is None:
            return 1.0
        chunks = self.plan(index, name)
        return len(chunks) / sum(chunk.tokens.start == 0 for chunk in chunks)

    def follows(self, index: int, first: str, name: str) -> bool:
        """Tell whether a profile can code chunks of what began with another."""
        assert self.layout is not None
        return follows(layer_step(name), [self.layout.layers], self.plan(index, first))


def layer_step(name: str) -> int:
    """Return how many layers a profile codes together."""
    return Pipeline.of(PRESETS[name]).layer_step


@lru_cache(maxsize=256)
def _cut(
    layout: KVLayout, tokens: int, first: str, names: tuple[str, ...], fine: bool
) -> tuple[Chunk, ...]:
    multiple = common_step(layer_step(first), map(layer_step, names), CHUNK_LAYERS)
    return plan(
        layout,
        range(tokens),
        CHUNK_LAYERS,
        layer_multiple=multiple,
        most_tokens=range_tokens(tokens, DEADLINE_TOKENS) if fine else None,
    )


def _seconds(cost: StageCost, native_bytes: int, calls: float) -> float:
    """Return the time of coding in so many times as many pieces: each has the fixed part anew."""
    return cost.seconds(native_bytes) + (calls - 1) * cost.offset_s


def chunks_of(native_bytes: int) -> int:
    """Return into how many chunks a transfer is cut."""
    return max(1, min(MOST_CHUNKS, math.ceil(native_bytes / CHUNK_BYTES)))


def scenarios(traces: Traces, seed: int, *, quick: bool) -> Iterator[Scenario]:
    """Yield all scenarios of a seed."""
    count = 150 if quick else 400
    yield _paper(traces, seed)
    for model, per_token, rate, burst in (
        ("qwen-32b", QWEN_32B, 0.6, 24),
        ("llama-8b", LLAMA_8B, 0.45, 12),
    ):
        for gbps in (5, 25, 100) if quick else (5, 10, 25, 40, 50, 100):
            yield _jct(f"jct-{model}-{gbps}", seed, per_token, gbps, rate, burst, 3 if quick else 6)
    for number, name in enumerate(
        sorted(traces.pensieve)[:: max(1, len(traces.pensieve) // 3)][:3]
    ):
        yield _pensieve(f"pensieve-{number + 1}", seed, traces.pensieve[name], count)
    links = sorted(traces.skyplane)
    for percent in (5, 50, 95):
        link_gbps, rtt_ms = links[round((len(links) - 1) * percent / 100)]
        yield _skyplane(f"skyplane-p{percent}", seed, link_gbps, rtt_ms, count // 2)
    yield _trace("azure-conv", seed, traces.arrivals["azure_conv"][:count], SMOLLM2, 60 * MB)
    yield _trace("azure-code", seed, traces.arrivals["azure_code"][:count], SMOLLM2, 80 * MB)
    every = 1 if not traces.complete else 8
    yield _mooncake(seed, traces.arrivals["mooncake"][::every][: count // 2], every)
    yield _raw_best("raw-best-gpu", seed, 4 * count, profiles.gpu(), 800 * GBIT, 4096 * LLAMA_8B)
    yield _raw_best("raw-best-cpu", seed, 4 * count, profiles.cpu(), 40 * GBIT, 2000 * SMOLLM2)
    yield _throttled(seed, count)
    yield _bursts(seed, count)
    yield _steps(seed, count)
    yield _classes(seed, count)
    yield _misjudged(seed, count)
    yield _small(seed, 8 * count)


def for_quality(seed: int, *, quick: bool) -> Iterator[Scenario]:
    """Yield the scenarios of a seed in which quality is maximised under an objective.

    Args:
        seed: Of arrivals and truth.
        quick: Fewer requests.
    """
    count = 100 if quick else 400
    for name, phase_s, per_s in (
        ("quality-moving", 6.0, 0.5),
        ("quality-slow-moves", 40.0, 0.5),
        ("quality-busy", 40.0, 1.5),
    ):
        yield _quality(name, seed, count, phase_s, per_s)


def _quality(name: str, seed: int, count: int, phase_s: float, per_s: float) -> Scenario:
    """Prompts of SmolLM2 over a link that moves between 20 Mbit/s and one that is faster than any codec."""
    rng = random.Random(f"{name}/{seed}")
    time_s, arrivals = 0.0, []
    for _ in range(count):
        time_s += rng.expovariate(per_s)
        arrivals.append(Arrival(time_s, int(rng.choice(PROMPT_TOKENS) * SMOLLM2)))
    course = [
        (number * phase_s, rate)
        for number, rate in zip(
            range(math.ceil(time_s / phase_s)),
            itertools.cycle((20 * MBIT, 100 * MBIT, 20 * GBIT, 100 * MBIT)),
            strict=False,
        )
    ]
    made = _make(name, seed, profiles.serving(), arrivals, course, budget_bp=100)
    return replace(made, objective_s=OBJECTIVE_S, layout=SMOLLM2_LAYOUT)


def _paper(traces: Traces, seed: int) -> Scenario:
    """The paper's 60 s; requests come so far apart that not even its static profile ever queues, as in its curves."""
    spacing_s, duration_s = 0.9, 60.0
    native = int(PAPER_TOKENS * QWEN_32B)
    arrivals = tuple(
        Arrival(index * spacing_s, native) for index in range(int(duration_s / spacing_s))
    )
    course = [
        (index * duration_s / len(traces.paper_gbps), gbps * GBIT)
        for index, gbps in enumerate(traces.paper_gbps)
    ]
    return _make("paper-60s", seed, profiles.gpu(), arrivals, course, budget_bp=PAPER_BUDGET_BP)


def _jct(
    name: str, seed: int, per_token: float, gbps: float, rate: float, burst: int, episodes: int
) -> Scenario:
    """Bursts of requests at a rate that makes raw transfers take as many times V/B as the paper's do; see the docs."""
    rng = random.Random(f"{name}/{seed}")
    arrivals: list[Arrival] = []
    native = int(PAPER_TOKENS * per_token)
    time_s = 0.0
    for _ in range(episodes):
        for _ in range(burst):
            time_s += rng.expovariate(rate)
            arrivals.append(Arrival(time_s, native))
        time_s += burst * native / (gbps * GBIT)
    return _make(
        name, seed, profiles.gpu(), arrivals, [(0.0, gbps * GBIT)], budget_bp=PAPER_BUDGET_BP
    )


def _pensieve(
    name: str, seed: int, series: tuple[Sequence[float], Sequence[float]], count: int
) -> Scenario:
    """The shape of a mobile network's bandwidth, scaled to 100 MB/s in the mean."""
    times, rates = series
    mean, span_s = sum(rates) / len(rates), times[-1]
    arrivals = _poisson(f"{name}/{seed}", count, 2.5, 40 * MB, 0.6)
    rounds = math.ceil(arrivals[-1].at_s / span_s)
    course = [
        (number * span_s + time_s, rate / mean * 100 * MB)
        for number in range(rounds)
        for time_s, rate in zip(times, rates, strict=True)
    ]
    return _make(name, seed, profiles.cpu(), arrivals, course, budget_bp=100)


def _skyplane(name: str, seed: int, gbps: float, rtt_ms: float, count: int) -> Scenario:
    """A link between cloud regions, offered 1.2 times of what it carries raw."""
    mean_bytes = 4000 * LLAMA_8B
    rate = 1.2 * gbps * GBIT / mean_bytes
    arrivals = _poisson(f"{name}/{seed}", count, rate, mean_bytes, 0.5)
    return _make(
        name,
        seed,
        profiles.gpu(),
        arrivals,
        [(0.0, gbps * GBIT)],
        budget_bp=PAPER_BUDGET_BP,
        rtt_s=rtt_ms / 1e3,
    )


def _trace(
    name: str,
    seed: int,
    requests: Sequence[tuple[float, int]],
    per_token: float,
    bytes_per_s: float,
) -> Scenario:
    """Real arrivals and prompts, on a link that raw transfers overload."""
    arrivals = [
        Arrival(at_s, int(max(LEAST_TOKENS, tokens) * per_token)) for at_s, tokens in requests
    ]
    return _make(name, seed, profiles.cpu(), arrivals, [(0.0, bytes_per_s)], budget_bp=100)


def _mooncake(seed: int, requests: Sequence[tuple[float, int]], every: int) -> Scenario:
    """Long prompts of one pair of eight, on 6 Gbit/s."""
    first_s = requests[0][0]
    stretch = 8 / every
    arrivals = [
        Arrival((at_s - first_s) * stretch, int(max(LEAST_TOKENS, tokens) * LLAMA_8B))
        for at_s, tokens in requests
    ]
    return _make(
        "mooncake", seed, profiles.gpu(), arrivals, [(0.0, 6 * GBIT)], budget_bp=PAPER_BUDGET_BP
    )


def _raw_best(
    name: str, seed: int, count: int, pareto: ParetoSet, bytes_per_s: float, mean_bytes: float
) -> Scenario:
    """A link so fast that any codec only costs time; it never stalls, or it would not be one."""
    arrivals = _poisson(f"{name}/{seed}", count, 2.0, mean_bytes, 0.4)
    course = [(0.0, bytes_per_s)]
    return _make(name, seed, pareto, arrivals, course, budget_bp=PAPER_BUDGET_BP, stalls=False)


def _throttled(seed: int, count: int) -> Scenario:
    """The producer's processor is cut to a quarter for the middle third."""
    arrivals = _poisson(f"throttled/{seed}", count, 3.0, 30 * MB, 0.5)
    end_s = arrivals[-1].at_s

    def slow(time_s: float) -> tuple[float, float]:
        return (4.0, 1.0) if end_s / 3 <= time_s < 2 * end_s / 3 else (1.0, 1.0)

    return _make(
        "throttled", seed, profiles.cpu(), arrivals, [(0.0, 70 * MB)], budget_bp=100, slow=slow
    )


def _bursts(seed: int, count: int) -> Scenario:
    """Ten requests at once every ten seconds."""
    rng = random.Random(f"bursts/{seed}")
    arrivals = [
        Arrival(index // 10 * 10.0 + rng.uniform(0, 0.05), int(40 * MB * rng.uniform(0.5, 1.5)))
        for index in range(count)
    ]
    arrivals.sort(key=lambda arrival: arrival.at_s)
    return _make("bursts", seed, profiles.cpu(), arrivals, [(0.0, 120 * MB)], budget_bp=100)


def _steps(seed: int, count: int) -> Scenario:
    """A link that changes between 4 Gbit/s and 500 Mbit/s every 30 s."""
    arrivals = _poisson(f"steps/{seed}", count, 2.0, 30 * MB, 0.5)
    rounds = math.ceil(arrivals[-1].at_s / 30)
    course = [(30.0 * n, (4 if n % 2 == 0 else 0.5) * GBIT) for n in range(rounds)]
    return _make("steps", seed, profiles.cpu(), arrivals, course, budget_bp=100)


def _classes(seed: int, count: int) -> Scenario:
    """Two workload classes: one tolerates 1 % of loss, the other .1 %."""
    rng = random.Random(f"classes/{seed}")
    arrivals = [
        Arrival(a.at_s, a.native_bytes, "default" if rng.random() < 0.7 else "strict")
        for a in _poisson(f"classes/{seed}", count, 2.0, 30 * MB, 0.5)
    ]
    made = _make("classes", seed, profiles.cpu(), arrivals, [(0.0, 60 * MB)], budget_bp=100)
    return replace(made, budgets_bp={"default": 100, "strict": 10})


def _misjudged(seed: int, count: int) -> Scenario:
    """The best codec was profiled on a busy machine: it is half as fast again as it looks, and looks second best."""
    arrivals = _poisson(f"misjudged/{seed}", count, 2.0, 30 * MB, 0.5)
    made = _make("misjudged", seed, profiles.cpu(), arrivals, [(0.0, 90 * MB)], budget_bp=100)
    truth = {name: Factors(wire=made.truth[name].wire) for name in made.truth}
    truth["centred-rans-fine"] = Factors(encode=1 / 1.5, decode=1 / 1.5)
    return replace(made, truth=truth)


def _small(seed: int, count: int) -> Scenario:
    """Many small requests of one chunk on a link that raw transfers fill: alone, each would be fastest raw."""
    rate = 700 * MB
    arrivals = _poisson(f"small/{seed}", count, 0.85 * rate / (4 * MB), 4 * MB, 0.4)
    course = [(0.0, rate)]
    return _make("small", seed, profiles.cpu(), arrivals, course, budget_bp=100, stalls=False)


def _poisson(
    seed: str, count: int, per_s: float, mean_bytes: float, spread: float
) -> list[Arrival]:
    """Return arrivals at random, of log-normal sizes of a mean."""
    rng = random.Random(seed)
    time_s, arrivals = 0.0, []
    for _ in range(count):
        time_s += rng.expovariate(per_s)
        size = mean_bytes * rng.lognormvariate(-(spread**2) / 2, spread)
        arrivals.append(Arrival(time_s, max(1, int(size))))
    return arrivals


def _make(
    name: str,
    seed: int,
    pareto: ParetoSet,
    arrivals: Sequence[Arrival],
    course: Sequence[tuple[float, float]],
    *,
    budget_bp: int,
    rtt_s: float = 5e-4,
    stalls: bool = True,
    slow: Callable[[float], tuple[float, float]] = lambda _: (1.0, 1.0),
) -> Scenario:
    """Return a scenario with the truth of its seed."""
    rng = random.Random(f"truth/{name}/{seed}")
    gpu = pareto.device != profiles.cpu().device
    return Scenario(
        name=name,
        pareto=pareto,
        default=profiles.GPU_DEFAULT if gpu else profiles.CPU_DEFAULT,
        budgets_bp={"default": budget_bp},
        arrivals=tuple(arrivals),
        capacity=_link(rng, course, arrivals[-1].at_s, stalls=stalls),
        rtt_s=rtt_s,
        prior_bytes_per_s=course[0][1] * rng.uniform(0.5, 1.5),
        truth=_truth(rng, pareto),
        scatter=tuple(_scatter(rng) for _ in arrivals),
        slow=slow,
    )


def _truth(rng: random.Random, pareto: ParetoSet) -> dict[str, Factors]:
    devices = rng.uniform(0.65, 1.35), rng.uniform(0.65, 1.35)

    def time(device: float) -> float:
        return 1 / min(1.5, max(0.5, device * rng.uniform(0.7, 1.3)))

    return {
        profile.name: Factors(time(devices[0]), time(devices[1]), rng.uniform(0.92, 1.08))
        for profile in pareto.profiles("default")
    }


def _scatter(rng: random.Random) -> Factors:
    held_up = 4.0 if rng.random() < 0.02 else 1.0
    return Factors(
        encode=rng.lognormvariate(0, 0.1) * held_up,
        decode=rng.lognormvariate(0, 0.1),
        wire=rng.lognormvariate(0, 0.04),
    )


def _link(
    rng: random.Random, course: Sequence[tuple[float, float]], end_s: float, *, stalls: bool
) -> Capacity:
    """Return a course of bandwidth with scatter and stalls; after the last arrival it goes on for a minute."""
    base = Capacity.of([at_s for at_s, _ in course], [rate for _, rate in course])
    steps = math.ceil((end_s + 60) / STEP_S)
    rates = [base.at(index * STEP_S) * rng.lognormvariate(-0.005, 0.1) for index in range(steps)]
    stall_s = rng.expovariate(1 / STALL_EVERY_S)
    while stalls and stall_s < end_s:
        first = int(stall_s / STEP_S)
        for index in range(first, min(steps, first + max(1, round(STALL_S / STEP_S)))):
            rates[index] *= STALL_SHARE
        stall_s += rng.expovariate(1 / STALL_EVERY_S)
    return Capacity.of([index * STEP_S for index in range(steps)], rates)
