"""Every error KVServe raises on purpose.

The class says what the caller should do; `reason` is a stable word for metrics and conditions.

    KVServeError
    ├── SpecError            what was given is wrong: do not retry, fix `field`
    │   ├── PolicyError      a KVServePolicy
    │   ├── StrategyError    a strategy that can't work, or an unknown stage
    │   └── ArtifactError    a Pareto set or calibration bundle that is missing, corrupt or of another schema
    ├── InfeasibleError      no profile meets the quality budget: loosen the budget
    ├── UnsupportedError     the model, layout or device is not supported: do not retry
    ├── ValuesError          KV values that a lossy strategy can't carry: send them as they are
    ├── WireError            bytes from a peer that must not be used: recompute
    ├── TransferError        a transfer that did not arrive: recompute
    ├── UnauthenticatedError who is at the other end does not prove to belong here: compare secrets and certificates
    └── UnavailableError     a service is not there now: retry after `retry_after_s`
"""

from enum import StrEnum


class KVServeError(Exception):
    """Base of all errors that KVServe raises on purpose.

    Attributes:
        reason: A CamelCase word from a fixed catalogue; safe as a metric label.
    """

    reason: str = "Error"


class SpecError(KVServeError):
    """Something a person or a file gave is wrong; retrying without a change is pointless.

    Attributes:
        field: The path of the offending field, like ``spec.quality.maxLossBasisPoints``.
        problem: What is wrong with it and what would be right.
    """

    reason = "InvalidSpec"

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class PolicyError(SpecError):
    """A KVServePolicy that can't be served."""

    reason = "InvalidPolicy"


class StrategyError(SpecError):
    """A strategy that can't work: unknown stage, wrong order, or a parameter out of range."""

    reason = "InvalidStrategy"


class ArtifactError(SpecError):
    """A Pareto set or calibration bundle that is missing, corrupt or of an unknown schema."""

    reason = "InvalidArtifact"


class InfeasibleError(KVServeError):
    """No profile but the raw one meets the quality budget."""

    reason = "Infeasible"


class UnsupportedError(KVServeError):
    """A model, cache layout or device that KVServe can't compress."""

    reason = "Unsupported"


class ValuesError(KVServeError):
    """KV values that a lossy strategy can't carry (NaN, infinity, too wide a range): send them as they are."""

    reason = "ValuesNotCodable"


class WireReason(StrEnum):
    """Why bytes from a peer were refused."""

    BAD_MAGIC = "BadMagic"
    UNSUPPORTED_VERSION = "UnsupportedVersion"
    TRUNCATED = "Truncated"
    TOO_LARGE = "TooLarge"
    MALFORMED = "Malformed"
    CHECKSUM_MISMATCH = "ChecksumMismatch"
    MODEL_MISMATCH = "ModelMismatch"
    LAYOUT_MISMATCH = "LayoutMismatch"
    STRATEGY_MISMATCH = "StrategyMismatch"
    BUNDLE_MISMATCH = "BundleMismatch"
    RANGE_MISMATCH = "RangeMismatch"


class WireError(KVServeError):
    """Bytes from a peer or store that must not be used; the request is recomputed."""

    def __init__(self, reason: WireReason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason.value
        self.detail = detail


class TransferReason(StrEnum):
    """Why a transfer did not arrive."""

    TIMEOUT = "Timeout"
    PEER_LOST = "PeerLost"
    PEER_REFUSED = "PeerRefused"
    EXPIRED = "Expired"
    CANCELLED = "Cancelled"
    OUT_OF_MEMORY = "OutOfMemory"


class TransferError(KVServeError):
    """A transfer that did not arrive whole and in time; the request is recomputed."""

    def __init__(self, reason: TransferReason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason.value
        self.detail = detail


class UnauthenticatedError(KVServeError):
    """Who is at the other end does not prove to belong here, or wants a proof that we don't have."""

    reason = "Unauthenticated"


class UnavailableError(KVServeError):
    """A service that is not there now.

    Attributes:
        retry_after_s: When to try again, in seconds.
    """

    reason = "Unavailable"

    def __init__(self, message: str, *, retry_after_s: float = 5.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
