from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PodMessage(_message.Message):
    __slots__ = ("hello", "ack", "nack", "reports", "decisions")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    NACK_FIELD_NUMBER: _ClassVar[int]
    REPORTS_FIELD_NUMBER: _ClassVar[int]
    DECISIONS_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    ack: Ack
    nack: Nack
    reports: TransferReports
    decisions: Decisions
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., nack: _Optional[_Union[Nack, _Mapping]] = ..., reports: _Optional[_Union[TransferReports, _Mapping]] = ..., decisions: _Optional[_Union[Decisions, _Mapping]] = ...) -> None: ...

class ControllerMessage(_message.Message):
    __slots__ = ("push", "heartbeat", "release")
    PUSH_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    push: Push
    heartbeat: Heartbeat
    release: Release
    def __init__(self, push: _Optional[_Union[Push, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., release: _Optional[_Union[Release, _Mapping]] = ...) -> None: ...

class Version(_message.Message):
    __slots__ = ("epoch", "counter")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    COUNTER_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    counter: int
    def __init__(self, epoch: _Optional[int] = ..., counter: _Optional[int] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("pod", "namespace", "role", "policy", "labels", "model_fingerprint", "connector_version", "version", "stages", "proof")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    POD_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CONNECTOR_VERSION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    pod: str
    namespace: str
    role: str
    policy: str
    labels: _containers.ScalarMap[str, str]
    model_fingerprint: str
    connector_version: str
    version: Version
    stages: _containers.RepeatedScalarFieldContainer[str]
    proof: bytes
    def __init__(self, pod: _Optional[str] = ..., namespace: _Optional[str] = ..., role: _Optional[str] = ..., policy: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., model_fingerprint: _Optional[str] = ..., connector_version: _Optional[str] = ..., version: _Optional[_Union[Version, _Mapping]] = ..., stages: _Optional[_Iterable[str]] = ..., proof: _Optional[bytes] = ...) -> None: ...

class Push(_message.Message):
    __slots__ = ("version", "nonce", "table")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    version: Version
    nonce: str
    table: DecisionTable
    def __init__(self, version: _Optional[_Union[Version, _Mapping]] = ..., nonce: _Optional[str] = ..., table: _Optional[_Union[DecisionTable, _Mapping]] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: Version
    def __init__(self, version: _Optional[_Union[Version, _Mapping]] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("version", "nonce")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    version: Version
    nonce: str
    def __init__(self, version: _Optional[_Union[Version, _Mapping]] = ..., nonce: _Optional[str] = ...) -> None: ...

class Nack(_message.Message):
    __slots__ = ("version", "nonce", "reason", "detail")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    version: Version
    nonce: str
    reason: str
    detail: str
    def __init__(self, version: _Optional[_Union[Version, _Mapping]] = ..., nonce: _Optional[str] = ..., reason: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class StageCost(_message.Message):
    __slots__ = ("floor_s", "offset_s", "bytes_per_s")
    FLOOR_S_FIELD_NUMBER: _ClassVar[int]
    OFFSET_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    floor_s: float
    offset_s: float
    bytes_per_s: float
    def __init__(self, floor_s: _Optional[float] = ..., offset_s: _Optional[float] = ..., bytes_per_s: _Optional[float] = ...) -> None: ...

class Candidate(_message.Message):
    __slots__ = ("name", "strategy", "ratio", "loss_upper_bp", "encode", "decode", "bundle", "encode_doubt", "decode_doubt", "wire_doubt")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STRATEGY_FIELD_NUMBER: _ClassVar[int]
    RATIO_FIELD_NUMBER: _ClassVar[int]
    LOSS_UPPER_BP_FIELD_NUMBER: _ClassVar[int]
    ENCODE_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    ENCODE_DOUBT_FIELD_NUMBER: _ClassVar[int]
    DECODE_DOUBT_FIELD_NUMBER: _ClassVar[int]
    WIRE_DOUBT_FIELD_NUMBER: _ClassVar[int]
    name: str
    strategy: bytes
    ratio: float
    loss_upper_bp: float
    encode: StageCost
    decode: StageCost
    bundle: str
    encode_doubt: float
    decode_doubt: float
    wire_doubt: float
    def __init__(self, name: _Optional[str] = ..., strategy: _Optional[bytes] = ..., ratio: _Optional[float] = ..., loss_upper_bp: _Optional[float] = ..., encode: _Optional[_Union[StageCost, _Mapping]] = ..., decode: _Optional[_Union[StageCost, _Mapping]] = ..., bundle: _Optional[str] = ..., encode_doubt: _Optional[float] = ..., decode_doubt: _Optional[float] = ..., wire_doubt: _Optional[float] = ...) -> None: ...

class ClassRule(_message.Message):
    __slots__ = ("goal", "candidates", "deadline_s", "margins", "explore_share")
    class MarginsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    GOAL_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    MARGINS_FIELD_NUMBER: _ClassVar[int]
    EXPLORE_SHARE_FIELD_NUMBER: _ClassVar[int]
    goal: str
    candidates: _containers.RepeatedScalarFieldContainer[str]
    deadline_s: float
    margins: _containers.ScalarMap[str, float]
    explore_share: float
    def __init__(self, goal: _Optional[str] = ..., candidates: _Optional[_Iterable[str]] = ..., deadline_s: _Optional[float] = ..., margins: _Optional[_Mapping[str, float]] = ..., explore_share: _Optional[float] = ...) -> None: ...

class DecisionTable(_message.Message):
    __slots__ = ("policy", "mode", "candidates", "rules", "pinned", "fallback", "ttl_s", "on_controller_loss", "prior_bytes_per_s", "hysteresis")
    class RulesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: ClassRule
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[ClassRule, _Mapping]] = ...) -> None: ...
    POLICY_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    ON_CONTROLLER_LOSS_FIELD_NUMBER: _ClassVar[int]
    PRIOR_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    HYSTERESIS_FIELD_NUMBER: _ClassVar[int]
    policy: str
    mode: str
    candidates: _containers.RepeatedCompositeFieldContainer[Candidate]
    rules: _containers.MessageMap[str, ClassRule]
    pinned: str
    fallback: str
    ttl_s: float
    on_controller_loss: str
    prior_bytes_per_s: float
    hysteresis: float
    def __init__(self, policy: _Optional[str] = ..., mode: _Optional[str] = ..., candidates: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ..., rules: _Optional[_Mapping[str, ClassRule]] = ..., pinned: _Optional[str] = ..., fallback: _Optional[str] = ..., ttl_s: _Optional[float] = ..., on_controller_loss: _Optional[str] = ..., prior_bytes_per_s: _Optional[float] = ..., hysteresis: _Optional[float] = ...) -> None: ...

class TransferReport(_message.Message):
    __slots__ = ("workload", "profile", "wanted", "bound", "version", "producer", "native_bytes", "wire_bytes", "encode_s", "wire_s", "decode_s", "total_s", "predicted_s", "model_s", "goodput_bytes_per_s", "failure", "exposed_s", "shares")
    class SharesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    WORKLOAD_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    BOUND_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PRODUCER_FIELD_NUMBER: _ClassVar[int]
    NATIVE_BYTES_FIELD_NUMBER: _ClassVar[int]
    WIRE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ENCODE_S_FIELD_NUMBER: _ClassVar[int]
    WIRE_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_S_FIELD_NUMBER: _ClassVar[int]
    TOTAL_S_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_S_FIELD_NUMBER: _ClassVar[int]
    MODEL_S_FIELD_NUMBER: _ClassVar[int]
    GOODPUT_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_S_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    workload: str
    profile: str
    wanted: str
    bound: str
    version: Version
    producer: str
    native_bytes: int
    wire_bytes: int
    encode_s: float
    wire_s: float
    decode_s: float
    total_s: float
    predicted_s: float
    model_s: float
    goodput_bytes_per_s: float
    failure: str
    exposed_s: float
    shares: _containers.ScalarMap[str, float]
    def __init__(self, workload: _Optional[str] = ..., profile: _Optional[str] = ..., wanted: _Optional[str] = ..., bound: _Optional[str] = ..., version: _Optional[_Union[Version, _Mapping]] = ..., producer: _Optional[str] = ..., native_bytes: _Optional[int] = ..., wire_bytes: _Optional[int] = ..., encode_s: _Optional[float] = ..., wire_s: _Optional[float] = ..., decode_s: _Optional[float] = ..., total_s: _Optional[float] = ..., predicted_s: _Optional[float] = ..., model_s: _Optional[float] = ..., goodput_bytes_per_s: _Optional[float] = ..., failure: _Optional[str] = ..., exposed_s: _Optional[float] = ..., shares: _Optional[_Mapping[str, float]] = ...) -> None: ...

class TransferReports(_message.Message):
    __slots__ = ("reports",)
    REPORTS_FIELD_NUMBER: _ClassVar[int]
    reports: _containers.RepeatedCompositeFieldContainer[TransferReport]
    def __init__(self, reports: _Optional[_Iterable[_Union[TransferReport, _Mapping]]] = ...) -> None: ...

class Decision(_message.Message):
    __slots__ = ("wall_s", "version", "peer", "workload", "native_bytes", "chunks", "bytes_per_s", "backlog_bytes", "rtt_s", "encode_backlog_s", "decode_backlog_s", "arrivals_per_s", "native_bytes_per_s", "encoder_arrivals_per_s", "encoder_native_bytes_per_s", "encode_factor", "candidates", "incumbent", "allowance_s", "profile", "wanted", "bound", "predicted_s", "extra_s", "encode_delays", "decode_delays", "hidden_s", "spent_s", "before_bytes_per_s")
    WALL_S_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    WORKLOAD_FIELD_NUMBER: _ClassVar[int]
    NATIVE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    BACKLOG_BYTES_FIELD_NUMBER: _ClassVar[int]
    RTT_S_FIELD_NUMBER: _ClassVar[int]
    ENCODE_BACKLOG_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_BACKLOG_S_FIELD_NUMBER: _ClassVar[int]
    ARRIVALS_PER_S_FIELD_NUMBER: _ClassVar[int]
    NATIVE_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    ENCODER_ARRIVALS_PER_S_FIELD_NUMBER: _ClassVar[int]
    ENCODER_NATIVE_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    ENCODE_FACTOR_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    INCUMBENT_FIELD_NUMBER: _ClassVar[int]
    ALLOWANCE_S_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    BOUND_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_S_FIELD_NUMBER: _ClassVar[int]
    EXTRA_S_FIELD_NUMBER: _ClassVar[int]
    ENCODE_DELAYS_FIELD_NUMBER: _ClassVar[int]
    DECODE_DELAYS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_S_FIELD_NUMBER: _ClassVar[int]
    SPENT_S_FIELD_NUMBER: _ClassVar[int]
    BEFORE_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    wall_s: float
    version: Version
    peer: str
    workload: str
    native_bytes: int
    chunks: int
    bytes_per_s: float
    backlog_bytes: float
    rtt_s: float
    encode_backlog_s: float
    decode_backlog_s: float
    arrivals_per_s: float
    native_bytes_per_s: float
    encoder_arrivals_per_s: float
    encoder_native_bytes_per_s: float
    encode_factor: float
    candidates: _containers.RepeatedScalarFieldContainer[str]
    incumbent: str
    allowance_s: float
    profile: str
    wanted: str
    bound: str
    predicted_s: float
    extra_s: float
    encode_delays: float
    decode_delays: float
    hidden_s: float
    spent_s: float
    before_bytes_per_s: float
    def __init__(self, wall_s: _Optional[float] = ..., version: _Optional[_Union[Version, _Mapping]] = ..., peer: _Optional[str] = ..., workload: _Optional[str] = ..., native_bytes: _Optional[int] = ..., chunks: _Optional[int] = ..., bytes_per_s: _Optional[float] = ..., backlog_bytes: _Optional[float] = ..., rtt_s: _Optional[float] = ..., encode_backlog_s: _Optional[float] = ..., decode_backlog_s: _Optional[float] = ..., arrivals_per_s: _Optional[float] = ..., native_bytes_per_s: _Optional[float] = ..., encoder_arrivals_per_s: _Optional[float] = ..., encoder_native_bytes_per_s: _Optional[float] = ..., encode_factor: _Optional[float] = ..., candidates: _Optional[_Iterable[str]] = ..., incumbent: _Optional[str] = ..., allowance_s: _Optional[float] = ..., profile: _Optional[str] = ..., wanted: _Optional[str] = ..., bound: _Optional[str] = ..., predicted_s: _Optional[float] = ..., extra_s: _Optional[float] = ..., encode_delays: _Optional[float] = ..., decode_delays: _Optional[float] = ..., hidden_s: _Optional[float] = ..., spent_s: _Optional[float] = ..., before_bytes_per_s: _Optional[float] = ...) -> None: ...

class Decisions(_message.Message):
    __slots__ = ("decisions",)
    DECISIONS_FIELD_NUMBER: _ClassVar[int]
    decisions: _containers.RepeatedCompositeFieldContainer[Decision]
    def __init__(self, decisions: _Optional[_Iterable[_Union[Decision, _Mapping]]] = ...) -> None: ...
