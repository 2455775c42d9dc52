"""What KVServe is compared with: fixed profiles, the paper's two controllers, and an oracle."""

import math
import random
from dataclasses import dataclass, field
from typing import Final

from controller_link import WatchedLink
from controller_queue import Sent
from controller_replay import Queues, Run, replay
from controller_scenarios import Arrival, Scenario
from kvserve_api.profile_set import NONE, Profile

PRICES: Final = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""What a second of the busiest server is taken to cost those who come later, in the oracle's runs."""
BUCKETS: Final = (0.0, 0.96, 0.99, 1.2)
"""The accuracy buckets of the paper's library."""
REFERENCE_BYTES: Final = 4096 * 128 * 1024
"""The library holds speeds at 4,096 tokens."""


class Static:
    """One profile for everything."""

    def __init__(self, name: str) -> None:
        self._name = name

    def choose(self, _index: int, _arrival: Arrival, _tandem: Queues) -> str:
        """Return it."""
        return self._name

    def sent(self, _index: int, _profile: str, _sent: Sent) -> None:
        """Learn nothing."""


class Greedy:
    """Knows the truth: takes what ends this transfer first, given all that is under way, plus a price of its work.

    Args:
        scenario: The truth.
        price: What each second on the server it keeps busy longest costs those behind it.
    """

    def __init__(self, scenario: Scenario, price: float) -> None:
        self._scenario = scenario
        self._price = price

    def choose(self, index: int, arrival: Arrival, tandem: Queues) -> str:
        """Return the cheapest."""
        best, least = NONE, math.inf
        for profile in self._scenario.allowed(arrival.workload):
            work = self._scenario.work(index, profile.name)
            cost = tandem.preview_s(arrival.at_s, work)
            if self._price:
                rate = tandem.capacity.at(max(arrival.at_s, tandem.link_free_s))
                held_s = max(work.encode_s, work.wire_bytes / rate, work.decode_s)
                cost += self._price * held_s
            if cost < least:
                best, least = profile.name, cost
        return best

    def sent(self, _index: int, _profile: str, _sent: Sent) -> None:
        """Learn nothing: it knew."""


def oracle(scenario: Scenario, statics: dict[str, Run]) -> Run:
    """Return the best run in hindsight of the clairvoyant at each price, and of each allowed fixed profile.

    The clairvoyant knows bandwidth to come, every codec's true time and every queue, but not the arrivals to come:
    how much to spare them is the price, chosen in hindsight. Therefore no fixed profile within the budget can beat
    it.
    """
    runs = [replay(scenario, Greedy(scenario, price)) for price in PRICES]
    runs += [run for run in statics.values() if run.violations == 0]
    return min(runs, key=lambda run: run.mean_s)


@dataclass
class _Arm:
    """What a controller of the paper has learned of one profile: seconds beyond the prediction."""

    delta_s: float = 0.0


@dataclass
class PaperController:
    """What both of the paper's controllers share; they differ in candidates and pick.

    Described in the paper's artefact: the time of a transfer is ``V/S + V/(B r)`` with a codec speed S that is the
    harmonic *mean* of encoding and decoding; a profile is worth it below ``B* = (1 - 1/r) S``, otherwise raw is sent;
    what is observed beyond the prediction is kept as an absolute residual. Here they are given more than their code
    has: the measured bandwidth of KVServe's own connector instead of a configured constant, and the whole time of
    each transfer, at once, instead of the time until it is queued.

    Attributes:
        scenario: What was profiled, and the budget.
        step: Weight of a new residual.
    """

    scenario: Scenario
    step: float
    _watched: WatchedLink = field(init=False)
    _pending: list[tuple[int, Sent]] = field(default_factory=list)
    _arms: dict[tuple[int, int, str], _Arm] = field(default_factory=dict)
    _keys: dict[int, tuple[tuple[int, int, str], float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._watched = WatchedLink(self.scenario.rtt_s)

    def candidates(self, arrival: Arrival, bytes_per_s: float) -> tuple[int, int, list[Profile]]:
        """Return two parts of the key that residuals are kept under, and the profiles to choose from."""
        raise NotImplementedError

    def pick(self, scores: dict[str, float]) -> str:
        """Return one of the scored profiles."""
        raise NotImplementedError

    def choose(self, index: int, arrival: Arrival, _tandem: Queues) -> str:
        """Return the profile of an arrival."""
        self._watched.until(arrival.at_s)
        self._learn(arrival.at_s)
        bytes_per_s = self._watched.link(self.scenario.prior_bytes_per_s).bytes_per_s
        first, second, profiles = self.candidates(arrival, bytes_per_s)
        scores, predicted = {}, {}
        for profile in profiles:
            native = arrival.native_bytes
            speed = codec_bytes_per_s(profile, native)
            if profile.name == NONE or bytes_per_s >= threshold_bytes_per_s(profile, native):
                continue
            predicted[profile.name] = native / speed + native / (profile.ratio * bytes_per_s)
            arm = self._arm((first, second, profile.name))
            scores[profile.name] = predicted[profile.name] + arm.delta_s
        name = self.pick(scores) if scores else NONE
        if name != NONE:
            self._keys[index] = (first, second, name), predicted[name]
        return name

    def sent(self, index: int, profile: str, sent: Sent) -> None:
        """Take note of a transfer, to learn from it when it has ended."""
        ratio = self.scenario.profiles[profile].ratio
        self._watched.promise(sent, self.scenario.arrivals[index].native_bytes / ratio)
        if index in self._keys:
            self._pending.append((index, sent))

    def _learn(self, now_s: float) -> None:
        waiting = []
        for entry in self._pending:
            index, sent = entry
            if sent.done_s > now_s:
                waiting.append(entry)
                continue
            key, predicted_s = self._keys.pop(index)
            arm = self._arm(key)
            arm.delta_s += self.step * (sent.total_s - predicted_s - arm.delta_s)
        self._pending = waiting

    def _arm(self, key: tuple[int, int, str]) -> _Arm:
        return self._arms.setdefault(key, _Arm())


class LegacyController(PaperController):
    """The one its serving path imports: accuracy bucket, interval of bandwidth, at most three arms, ε-greedy.

    Args:
        scenario: What was profiled, and the budget.
        seed: Of its exploration.
        strict: Keep it to the quality budget, which its buckets don't.
    """

    def __init__(self, scenario: Scenario, seed: int, *, strict: bool) -> None:
        super().__init__(scenario, 0.2)
        self._rng = random.Random(seed)
        self._strict = strict

    def candidates(self, arrival: Arrival, bytes_per_s: float) -> tuple[int, int, list[Profile]]:
        """Return the arms of the bucket that the budget falls in; it may hold worse profiles than the budget allows."""
        wanted = 1 - self.scenario.budgets_bp[arrival.workload] / 1e4
        bucket = max(n for n, floor in enumerate(BUCKETS[:-1]) if floor <= wanted)
        inside = [
            profile
            for profile in self.scenario.profiles.values()
            if profile.name != NONE
            and BUCKETS[bucket] <= 1 - profile.loss_upper_bp / 1e4 < BUCKETS[bucket + 1]
            and not (self._strict and 1 - profile.loss_upper_bp / 1e4 < wanted)
        ]
        # intervals end at each profile's own threshold, not where two of them cross
        steps = sorted(_pareto(inside), key=lambda p: -threshold_bytes_per_s(p, REFERENCE_BYTES))
        below = [
            number
            for number, profile in enumerate(steps)
            if bytes_per_s < threshold_bytes_per_s(profile, REFERENCE_BYTES)
        ]
        if not below:
            return bucket, -1, []
        last = below[-1]
        return bucket, last, steps[max(0, last - 1) : last + 2]

    def pick(self, scores: dict[str, float]) -> str:
        """Return the best, or one in ten times any."""
        if self._rng.random() < 0.1:
            return self._rng.choice(sorted(scores))
        return min(scores, key=scores.__getitem__)


class DynamicController(PaperController):
    """The one its artefact evaluation runs: all profiles that are accurate enough, the least corrected time."""

    def __init__(self, scenario: Scenario) -> None:
        super().__init__(scenario, 0.3)

    def candidates(self, arrival: Arrival, _bytes_per_s: float) -> tuple[int, int, list[Profile]]:
        """Return all within the budget."""
        return 0, 0, self.scenario.allowed(arrival.workload)

    def pick(self, scores: dict[str, float]) -> str:
        """Return the best."""
        return min(scores, key=scores.__getitem__)


def codec_bytes_per_s(profile: Profile, native_bytes: float) -> float:
    """Return the paper's codec speed: the harmonic mean of both directions, twice what one after the other gives."""
    seconds = profile.encode.seconds(native_bytes) + profile.decode.seconds(native_bytes)
    return 2 * native_bytes / seconds if seconds > 0 else math.inf


def threshold_bytes_per_s(profile: Profile, native_bytes: float) -> float:
    """Return the paper's B*: the bandwidth below which compression is worth it."""
    return (1 - 1 / profile.ratio) * codec_bytes_per_s(profile, native_bytes)


def _pareto(profiles: list[Profile]) -> list[Profile]:
    """Return the profiles that no other beats in ratio and speed."""

    def beats(other: Profile, one: Profile) -> bool:
        a = other.ratio, codec_bytes_per_s(other, REFERENCE_BYTES)
        b = one.ratio, codec_bytes_per_s(one, REFERENCE_BYTES)
        return a != b and a[0] >= b[0] and a[1] >= b[1]

    return [one for one in profiles if not any(beats(other, one) for other in profiles)]
