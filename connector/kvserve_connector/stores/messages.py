"""What the two halves of the connector tell each other about KV stores."""

from dataclasses import dataclass, field

from kvserve_connector.recompute import Speed


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt as a store knows it.

    Attributes:
        request_id: The request's name in this engine.
        tokens: Its token ids, int32 one after the other.
        extras: What else decides its KV.
        workload: The request's workload class.
        traceparent: W3C trace context of the request; None if it is not traced.
    """

    request_id: str
    tokens: bytes
    extras: tuple[str, ...]
    workload: str
    traceparent: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Lookup:
    """A question: how much of this prompt is in the store, and is it worth fetching?

    Attributes:
        prompt: The prompt.
        computed: Tokens from its start on that are here already.
        speed: How fast this engine computes; None if that is not known yet.
    """

    prompt: Prompt
    computed: int
    speed: Speed | None


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreLoad:
    """What was found is to be fetched.

    Attributes:
        request_id: The request's name in this engine.
        tokens: Which tokens are wanted; those before are here already.
        block_ids: The request's blocks.
    """

    request_id: str
    tokens: range
    block_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSave:
    """A prompt that was computed here.

    Attributes:
        prompt: The prompt.
        start: Tokens from its start on that came from the store.
        block_ids: The request's blocks; they hold the whole prompt, until the request is dropped.
    """

    prompt: Prompt
    start: int
    block_ids: tuple[int, ...]


@dataclass(kw_only=True, slots=True)
class StoreStep:
    """The news of one engine step, for the worker.

    Attributes:
        number: Of the step, to be given back when its forward pass has ended; None if nobody measures it.
        lookups: Questions.
        loads: What to fetch.
        saves: What to store.
        dropped: Requests whose blocks are about to be used by others.
        finished: Requests that have ended; what is under way for them may stop.
        kept: Those of them whose blocks wait until their save has read them.
        late: How many questions took too long.
        idle: Whether nothing is computed in this step.
    """

    number: int | None = None
    lookups: list[Lookup] = field(default_factory=list)
    loads: list[StoreLoad] = field(default_factory=list)
    saves: list[StoreSave] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    late: int = 0
    idle: bool = False


@dataclass(kw_only=True, slots=True)
class StoreNews:
    """What the worker answers.

    Attributes:
        steps: Steps whose forward pass has ended.
        found: For each request that was asked for the tokens, from the prompt's start on, that are worth fetching.
        failed: Requests of which not all could be fetched.
        saved: Requests whose blocks are not read any more.
    """

    steps: list[int] = field(default_factory=list)
    found: dict[str, int] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    saved: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.steps or self.found or self.failed or self.saved)
