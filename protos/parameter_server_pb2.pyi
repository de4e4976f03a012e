from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_PARAMETER: _ClassVar[Role]
    ROLE_STATE: _ClassVar[Role]
    ROLE_CONSTANT: _ClassVar[Role]

class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PHASE_UNSPECIFIED: _ClassVar[Phase]
    PHASE_COMPILING: _ClassVar[Phase]
    PHASE_WAITING: _ClassVar[Phase]
    PHASE_LOADING: _ClassVar[Phase]
    PHASE_COMPUTING: _ClassVar[Phase]
    PHASE_SENDING: _ClassVar[Phase]

class OutcomeCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSPECIFIED: _ClassVar[OutcomeCode]
    OUTCOME_APPLIED: _ClassVar[OutcomeCode]
    OUTCOME_HELD: _ClassVar[OutcomeCode]
    OUTCOME_DUPLICATE: _ClassVar[OutcomeCode]
    OUTCOME_STALE: _ClassVar[OutcomeCode]
    OUTCOME_LEASE_LOST: _ClassVar[OutcomeCode]
    OUTCOME_REJECTED: _ClassVar[OutcomeCode]
    OUTCOME_MISSING: _ClassVar[OutcomeCode]

class RejectedFor(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REJECTED_FOR_UNSPECIFIED: _ClassVar[RejectedFor]
    REJECTED_FOR_MALFORMED: _ClassVar[RejectedFor]
    REJECTED_FOR_NOT_FINITE: _ClassVar[RejectedFor]

class ByeReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BYE_UNSPECIFIED: _ClassVar[ByeReason]
    BYE_FINISHED: _ClassVar[ByeReason]
    BYE_STOPPED: _ClassVar[ByeReason]
    BYE_EVICTED: _ClassVar[ByeReason]
    BYE_FAILED: _ClassVar[ByeReason]
    BYE_LEFT: _ClassVar[ByeReason]

class RunState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RUN_UNSPECIFIED: _ClassVar[RunState]
    RUN_WAITING: _ClassVar[RunState]
    RUN_TRAINING: _ClassVar[RunState]
    RUN_PAUSED: _ClassVar[RunState]
    RUN_FINISHED: _ClassVar[RunState]
    RUN_FAILED: _ClassVar[RunState]
    RUN_STOPPING: _ClassVar[RunState]
ROLE_UNSPECIFIED: Role
ROLE_PARAMETER: Role
ROLE_STATE: Role
ROLE_CONSTANT: Role
PHASE_UNSPECIFIED: Phase
PHASE_COMPILING: Phase
PHASE_WAITING: Phase
PHASE_LOADING: Phase
PHASE_COMPUTING: Phase
PHASE_SENDING: Phase
OUTCOME_UNSPECIFIED: OutcomeCode
OUTCOME_APPLIED: OutcomeCode
OUTCOME_HELD: OutcomeCode
OUTCOME_DUPLICATE: OutcomeCode
OUTCOME_STALE: OutcomeCode
OUTCOME_LEASE_LOST: OutcomeCode
OUTCOME_REJECTED: OutcomeCode
OUTCOME_MISSING: OutcomeCode
REJECTED_FOR_UNSPECIFIED: RejectedFor
REJECTED_FOR_MALFORMED: RejectedFor
REJECTED_FOR_NOT_FINITE: RejectedFor
BYE_UNSPECIFIED: ByeReason
BYE_FINISHED: ByeReason
BYE_STOPPED: ByeReason
BYE_EVICTED: ByeReason
BYE_FAILED: ByeReason
BYE_LEFT: ByeReason
RUN_UNSPECIFIED: RunState
RUN_WAITING: RunState
RUN_TRAINING: RunState
RUN_PAUSED: RunState
RUN_FINISHED: RunState
RUN_FAILED: RunState
RUN_STOPPING: RunState

class Stamp(_message.Message):
    __slots__ = ("incarnation", "version", "durable_version")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DURABLE_VERSION_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    version: int
    durable_version: int
    def __init__(self, incarnation: _Optional[int] = ..., version: _Optional[int] = ..., durable_version: _Optional[int] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("name", "role", "dtype", "shape", "offset")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    name: str
    role: Role
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    offset: int
    def __init__(self, name: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., offset: _Optional[int] = ...) -> None: ...

class Layout(_message.Message):
    __slots__ = ("tensors",)
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    def __init__(self, tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ...) -> None: ...

class BatchId(_message.Message):
    __slots__ = ("epoch", "shard", "number")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    shard: int
    number: int
    def __init__(self, epoch: _Optional[int] = ..., shard: _Optional[int] = ..., number: _Optional[int] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("life", "number")
    LIFE_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    life: int
    number: int
    def __init__(self, life: _Optional[int] = ..., number: _Optional[int] = ...) -> None: ...

class TaskIdentity(_message.Message):
    __slots__ = ("name", "options", "example_count", "batch_size", "seed")
    class OptionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    EXAMPLE_COUNT_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    name: str
    options: _containers.ScalarMap[str, str]
    example_count: int
    batch_size: int
    seed: int
    def __init__(self, name: _Optional[str] = ..., options: _Optional[_Mapping[str, str]] = ..., example_count: _Optional[int] = ..., batch_size: _Optional[int] = ..., seed: _Optional[int] = ...) -> None: ...

class WorkerMessage(_message.Message):
    __slots__ = ("hello", "ready", "progress", "push", "push_part", "leave", "body")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    PUSH_FIELD_NUMBER: _ClassVar[int]
    PUSH_PART_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    ready: Ready
    progress: Progress
    push: Push
    push_part: PushPart
    leave: Leave
    body: bytes
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., ready: _Optional[_Union[Ready, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., push: _Optional[_Union[Push, _Mapping]] = ..., push_part: _Optional[_Union[PushPart, _Mapping]] = ..., leave: _Optional[_Union[Leave, _Mapping]] = ..., body: _Optional[bytes] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "instance", "attempt", "run_id", "seen_incarnation", "task", "layout", "name", "host", "pid", "platform", "devices", "software", "compute", "pipelines")
    class SoftwareEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class ComputeEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SEEN_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    PLATFORM_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_FIELD_NUMBER: _ClassVar[int]
    PIPELINES_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    instance: int
    attempt: int
    run_id: str
    seen_incarnation: int
    task: TaskIdentity
    layout: Layout
    name: str
    host: str
    pid: int
    platform: str
    devices: int
    software: _containers.ScalarMap[str, str]
    compute: _containers.ScalarMap[str, str]
    pipelines: bool
    def __init__(self, protocol: _Optional[int] = ..., instance: _Optional[int] = ..., attempt: _Optional[int] = ..., run_id: _Optional[str] = ..., seen_incarnation: _Optional[int] = ..., task: _Optional[_Union[TaskIdentity, _Mapping]] = ..., layout: _Optional[_Union[Layout, _Mapping]] = ..., name: _Optional[str] = ..., host: _Optional[str] = ..., pid: _Optional[int] = ..., platform: _Optional[str] = ..., devices: _Optional[int] = ..., software: _Optional[_Mapping[str, str]] = ..., compute: _Optional[_Mapping[str, str]] = ..., pipelines: bool = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("run_id", "worker_id", "name", "seed", "batch_size", "epochs", "batches_per_epoch", "max_part_bytes", "session_timeout_s", "warnings", "local_steps", "inner_optimizer", "same_host", "compression", "pull_dtype", "pipelines")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    BATCHES_PER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    MAX_PART_BYTES_FIELD_NUMBER: _ClassVar[int]
    SESSION_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    LOCAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    INNER_OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    SAME_HOST_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    PULL_DTYPE_FIELD_NUMBER: _ClassVar[int]
    PIPELINES_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    worker_id: int
    name: str
    seed: int
    batch_size: int
    epochs: int
    batches_per_epoch: int
    max_part_bytes: int
    session_timeout_s: float
    warnings: _containers.RepeatedScalarFieldContainer[str]
    local_steps: int
    inner_optimizer: str
    same_host: SameHost
    compression: str
    pull_dtype: str
    pipelines: bool
    def __init__(self, run_id: _Optional[str] = ..., worker_id: _Optional[int] = ..., name: _Optional[str] = ..., seed: _Optional[int] = ..., batch_size: _Optional[int] = ..., epochs: _Optional[int] = ..., batches_per_epoch: _Optional[int] = ..., max_part_bytes: _Optional[int] = ..., session_timeout_s: _Optional[float] = ..., warnings: _Optional[_Iterable[str]] = ..., local_steps: _Optional[int] = ..., inner_optimizer: _Optional[str] = ..., same_host: _Optional[_Union[SameHost, _Mapping]] = ..., compression: _Optional[str] = ..., pull_dtype: _Optional[str] = ..., pipelines: bool = ...) -> None: ...

class SameHost(_message.Message):
    __slots__ = ("socket", "key")
    SOCKET_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    socket: str
    key: bytes
    def __init__(self, socket: _Optional[str] = ..., key: _Optional[bytes] = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ("compile_s",)
    COMPILE_S_FIELD_NUMBER: _ClassVar[int]
    compile_s: float
    def __init__(self, compile_s: _Optional[float] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("phase", "steps")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    phase: Phase
    steps: int
    def __init__(self, phase: _Optional[_Union[Phase, str]] = ..., steps: _Optional[int] = ...) -> None: ...

class Push(_message.Message):
    __slots__ = ("token", "base", "incarnation", "loss", "metrics", "compute_s", "load_s", "slot", "queue_s", "tallies")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    LOAD_S_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    TALLIES_FIELD_NUMBER: _ClassVar[int]
    token: Token
    base: int
    incarnation: int
    loss: float
    metrics: _containers.ScalarMap[str, float]
    compute_s: float
    load_s: float
    slot: int
    queue_s: float
    tallies: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, token: _Optional[_Union[Token, _Mapping]] = ..., base: _Optional[int] = ..., incarnation: _Optional[int] = ..., loss: _Optional[float] = ..., metrics: _Optional[_Mapping[str, float]] = ..., compute_s: _Optional[float] = ..., load_s: _Optional[float] = ..., slot: _Optional[int] = ..., queue_s: _Optional[float] = ..., tallies: _Optional[_Iterable[float]] = ...) -> None: ...

class PushPart(_message.Message):
    __slots__ = ("token", "offset")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    token: Token
    offset: int
    def __init__(self, token: _Optional[_Union[Token, _Mapping]] = ..., offset: _Optional[int] = ...) -> None: ...

class Leave(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ServerMessage(_message.Message):
    __slots__ = ("stamp", "welcome", "outcome", "weights", "lease", "ticket", "bye", "new_slots", "gone_slots", "body")
    STAMP_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    BYE_FIELD_NUMBER: _ClassVar[int]
    NEW_SLOTS_FIELD_NUMBER: _ClassVar[int]
    GONE_SLOTS_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    stamp: Stamp
    welcome: Welcome
    outcome: Outcome
    weights: WeightsPart
    lease: Lease
    ticket: Ticket
    bye: Bye
    new_slots: _containers.RepeatedScalarFieldContainer[int]
    gone_slots: _containers.RepeatedScalarFieldContainer[int]
    body: bytes
    def __init__(self, stamp: _Optional[_Union[Stamp, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., outcome: _Optional[_Union[Outcome, _Mapping]] = ..., weights: _Optional[_Union[WeightsPart, _Mapping]] = ..., lease: _Optional[_Union[Lease, _Mapping]] = ..., ticket: _Optional[_Union[Ticket, _Mapping]] = ..., bye: _Optional[_Union[Bye, _Mapping]] = ..., new_slots: _Optional[_Iterable[int]] = ..., gone_slots: _Optional[_Iterable[int]] = ..., body: _Optional[bytes] = ...) -> None: ...

class WeightsPart(_message.Message):
    __slots__ = ("version", "offset", "total_bytes", "slot")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    version: int
    offset: int
    total_bytes: int
    slot: int
    def __init__(self, version: _Optional[int] = ..., offset: _Optional[int] = ..., total_bytes: _Optional[int] = ..., slot: _Optional[int] = ...) -> None: ...

class Batch(_message.Message):
    __slots__ = ("id", "indices")
    ID_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    id: BatchId
    indices: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, id: _Optional[_Union[BatchId, _Mapping]] = ..., indices: _Optional[_Iterable[int]] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("granted", "withdrawn")
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    WITHDRAWN_FIELD_NUMBER: _ClassVar[int]
    granted: _containers.RepeatedCompositeFieldContainer[Batch]
    withdrawn: _containers.RepeatedCompositeFieldContainer[BatchId]
    def __init__(self, granted: _Optional[_Iterable[_Union[Batch, _Mapping]]] = ..., withdrawn: _Optional[_Iterable[_Union[BatchId, _Mapping]]] = ...) -> None: ...

class Ticket(_message.Message):
    __slots__ = ("token", "batches", "base", "deadline_s", "gradient_slot")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_SLOT_FIELD_NUMBER: _ClassVar[int]
    token: Token
    batches: _containers.RepeatedCompositeFieldContainer[BatchId]
    base: int
    deadline_s: float
    gradient_slot: int
    def __init__(self, token: _Optional[_Union[Token, _Mapping]] = ..., batches: _Optional[_Iterable[_Union[BatchId, _Mapping]]] = ..., base: _Optional[int] = ..., deadline_s: _Optional[float] = ..., gradient_slot: _Optional[int] = ...) -> None: ...

class Outcome(_message.Message):
    __slots__ = ("token", "code", "version", "staleness", "rejected_for", "message")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FOR_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    token: Token
    code: OutcomeCode
    version: int
    staleness: int
    rejected_for: RejectedFor
    message: str
    def __init__(self, token: _Optional[_Union[Token, _Mapping]] = ..., code: _Optional[_Union[OutcomeCode, str]] = ..., version: _Optional[int] = ..., staleness: _Optional[int] = ..., rejected_for: _Optional[_Union[RejectedFor, str]] = ..., message: _Optional[str] = ...) -> None: ...

class Bye(_message.Message):
    __slots__ = ("reason", "message")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    reason: ByeReason
    message: str
    def __init__(self, reason: _Optional[_Union[ByeReason, str]] = ..., message: _Optional[str] = ...) -> None: ...

class SessionPush(_message.Message):
    __slots__ = ("session", "opened_version", "sequence", "attempt", "run_id", "incarnation", "base_incarnation", "base", "layout", "loss", "examples", "asks", "name", "host", "body", "pid")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    OPENED_VERSION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    BASE_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    ASKS_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    session: int
    opened_version: int
    sequence: int
    attempt: int
    run_id: str
    incarnation: int
    base_incarnation: int
    base: int
    layout: bytes
    loss: float
    examples: int
    asks: bool
    name: str
    host: str
    body: bytes
    pid: int
    def __init__(self, session: _Optional[int] = ..., opened_version: _Optional[int] = ..., sequence: _Optional[int] = ..., attempt: _Optional[int] = ..., run_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., base_incarnation: _Optional[int] = ..., base: _Optional[int] = ..., layout: _Optional[bytes] = ..., loss: _Optional[float] = ..., examples: _Optional[int] = ..., asks: bool = ..., name: _Optional[str] = ..., host: _Optional[str] = ..., body: _Optional[bytes] = ..., pid: _Optional[int] = ...) -> None: ...

class SessionReply(_message.Message):
    __slots__ = ("stamp", "code", "version", "staleness", "rejected_for", "message", "last_sequence")
    STAMP_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FOR_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    LAST_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    stamp: Stamp
    code: OutcomeCode
    version: int
    staleness: int
    rejected_for: RejectedFor
    message: str
    last_sequence: int
    def __init__(self, stamp: _Optional[_Union[Stamp, _Mapping]] = ..., code: _Optional[_Union[OutcomeCode, str]] = ..., version: _Optional[int] = ..., staleness: _Optional[int] = ..., rejected_for: _Optional[_Union[RejectedFor, str]] = ..., message: _Optional[str] = ..., last_sequence: _Optional[int] = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("min_version", "wait_s", "run_id", "seen_incarnation", "have_version", "evaluates", "min_epoch", "for_evaluation")
    MIN_VERSION_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SEEN_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    HAVE_VERSION_FIELD_NUMBER: _ClassVar[int]
    EVALUATES_FIELD_NUMBER: _ClassVar[int]
    MIN_EPOCH_FIELD_NUMBER: _ClassVar[int]
    FOR_EVALUATION_FIELD_NUMBER: _ClassVar[int]
    min_version: int
    wait_s: float
    run_id: str
    seen_incarnation: int
    have_version: int
    evaluates: bool
    min_epoch: int
    for_evaluation: bool
    def __init__(self, min_version: _Optional[int] = ..., wait_s: _Optional[float] = ..., run_id: _Optional[str] = ..., seen_incarnation: _Optional[int] = ..., have_version: _Optional[int] = ..., evaluates: bool = ..., min_epoch: _Optional[int] = ..., for_evaluation: bool = ...) -> None: ...

class PullReply(_message.Message):
    __slots__ = ("stamp", "layout", "weights", "run_id", "state", "epoch", "epochs", "body")
    STAMP_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    stamp: Stamp
    layout: Layout
    weights: WeightsPart
    run_id: str
    state: RunState
    epoch: int
    epochs: int
    body: bytes
    def __init__(self, stamp: _Optional[_Union[Stamp, _Mapping]] = ..., layout: _Optional[_Union[Layout, _Mapping]] = ..., weights: _Optional[_Union[WeightsPart, _Mapping]] = ..., run_id: _Optional[str] = ..., state: _Optional[_Union[RunState, str]] = ..., epoch: _Optional[int] = ..., epochs: _Optional[int] = ..., body: _Optional[bytes] = ...) -> None: ...

class EvaluationReport(_message.Message):
    __slots__ = ("incarnation", "version", "metrics", "duration_s", "epoch")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    version: int
    metrics: _containers.ScalarMap[str, float]
    duration_s: float
    epoch: int
    def __init__(self, incarnation: _Optional[int] = ..., version: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., duration_s: _Optional[float] = ..., epoch: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ("watches",)
    WATCHES_FIELD_NUMBER: _ClassVar[int]
    watches: bool
    def __init__(self, watches: bool = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("stamp", "run_id", "task", "state", "epoch", "epochs", "batches_applied", "batches_total", "loss", "metrics", "metrics_version", "updates_per_second", "examples_per_second", "staleness", "rejected", "parameters", "bytes_in", "bytes_out", "workers", "run_dir", "consistency", "optimizer", "skipped", "problems", "uptime_s", "training_metrics", "example_count", "batch_size", "batches_pending", "batches_leased", "batches_admitted", "durability", "snapshot_every", "staleness_policy", "local_steps", "inner_optimizer", "times", "optimizer_numbers", "compression", "pull_dtype", "seed", "session_updates")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class TrainingMetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class OptimizerNumbersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    STAMP_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    BATCHES_APPLIED_FIELD_NUMBER: _ClassVar[int]
    BATCHES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    METRICS_VERSION_FIELD_NUMBER: _ClassVar[int]
    UPDATES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    BYTES_IN_FIELD_NUMBER: _ClassVar[int]
    BYTES_OUT_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    RUN_DIR_FIELD_NUMBER: _ClassVar[int]
    CONSISTENCY_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    TRAINING_METRICS_FIELD_NUMBER: _ClassVar[int]
    EXAMPLE_COUNT_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    BATCHES_PENDING_FIELD_NUMBER: _ClassVar[int]
    BATCHES_LEASED_FIELD_NUMBER: _ClassVar[int]
    BATCHES_ADMITTED_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_EVERY_FIELD_NUMBER: _ClassVar[int]
    STALENESS_POLICY_FIELD_NUMBER: _ClassVar[int]
    LOCAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    INNER_OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_NUMBERS_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    PULL_DTYPE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SESSION_UPDATES_FIELD_NUMBER: _ClassVar[int]
    stamp: Stamp
    run_id: str
    task: str
    state: RunState
    epoch: int
    epochs: int
    batches_applied: int
    batches_total: int
    loss: float
    metrics: _containers.ScalarMap[str, float]
    metrics_version: int
    updates_per_second: float
    examples_per_second: float
    staleness: Staleness
    rejected: Rejected
    parameters: int
    bytes_in: int
    bytes_out: int
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    run_dir: str
    consistency: str
    optimizer: str
    skipped: int
    problems: _containers.RepeatedScalarFieldContainer[str]
    uptime_s: float
    training_metrics: _containers.ScalarMap[str, float]
    example_count: int
    batch_size: int
    batches_pending: int
    batches_leased: int
    batches_admitted: int
    durability: str
    snapshot_every: str
    staleness_policy: str
    local_steps: int
    inner_optimizer: str
    times: Times
    optimizer_numbers: _containers.ScalarMap[str, float]
    compression: str
    pull_dtype: str
    seed: int
    session_updates: int
    def __init__(self, stamp: _Optional[_Union[Stamp, _Mapping]] = ..., run_id: _Optional[str] = ..., task: _Optional[str] = ..., state: _Optional[_Union[RunState, str]] = ..., epoch: _Optional[int] = ..., epochs: _Optional[int] = ..., batches_applied: _Optional[int] = ..., batches_total: _Optional[int] = ..., loss: _Optional[float] = ..., metrics: _Optional[_Mapping[str, float]] = ..., metrics_version: _Optional[int] = ..., updates_per_second: _Optional[float] = ..., examples_per_second: _Optional[float] = ..., staleness: _Optional[_Union[Staleness, _Mapping]] = ..., rejected: _Optional[_Union[Rejected, _Mapping]] = ..., parameters: _Optional[int] = ..., bytes_in: _Optional[int] = ..., bytes_out: _Optional[int] = ..., workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ..., run_dir: _Optional[str] = ..., consistency: _Optional[str] = ..., optimizer: _Optional[str] = ..., skipped: _Optional[int] = ..., problems: _Optional[_Iterable[str]] = ..., uptime_s: _Optional[float] = ..., training_metrics: _Optional[_Mapping[str, float]] = ..., example_count: _Optional[int] = ..., batch_size: _Optional[int] = ..., batches_pending: _Optional[int] = ..., batches_leased: _Optional[int] = ..., batches_admitted: _Optional[int] = ..., durability: _Optional[str] = ..., snapshot_every: _Optional[str] = ..., staleness_policy: _Optional[str] = ..., local_steps: _Optional[int] = ..., inner_optimizer: _Optional[str] = ..., times: _Optional[_Union[Times, _Mapping]] = ..., optimizer_numbers: _Optional[_Mapping[str, float]] = ..., compression: _Optional[str] = ..., pull_dtype: _Optional[str] = ..., seed: _Optional[int] = ..., session_updates: _Optional[int] = ...) -> None: ...

class Times(_message.Message):
    __slots__ = ("wait_s", "load_s", "compute_s", "wire_s")
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    LOAD_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    WIRE_S_FIELD_NUMBER: _ClassVar[int]
    wait_s: float
    load_s: float
    compute_s: float
    wire_s: float
    def __init__(self, wait_s: _Optional[float] = ..., load_s: _Optional[float] = ..., compute_s: _Optional[float] = ..., wire_s: _Optional[float] = ...) -> None: ...

class Staleness(_message.Message):
    __slots__ = ("mean", "p50", "p99", "max", "histogram")
    class HistogramEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: int
        def __init__(self, key: _Optional[int] = ..., value: _Optional[int] = ...) -> None: ...
    MEAN_FIELD_NUMBER: _ClassVar[int]
    P50_FIELD_NUMBER: _ClassVar[int]
    P99_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    HISTOGRAM_FIELD_NUMBER: _ClassVar[int]
    mean: float
    p50: int
    p99: int
    max: int
    histogram: _containers.ScalarMap[int, int]
    def __init__(self, mean: _Optional[float] = ..., p50: _Optional[int] = ..., p99: _Optional[int] = ..., max: _Optional[int] = ..., histogram: _Optional[_Mapping[int, int]] = ...) -> None: ...

class Rejected(_message.Message):
    __slots__ = ("stale", "lease_lost", "duplicate", "nonfinite", "malformed")
    STALE_FIELD_NUMBER: _ClassVar[int]
    LEASE_LOST_FIELD_NUMBER: _ClassVar[int]
    DUPLICATE_FIELD_NUMBER: _ClassVar[int]
    NONFINITE_FIELD_NUMBER: _ClassVar[int]
    MALFORMED_FIELD_NUMBER: _ClassVar[int]
    stale: int
    lease_lost: int
    duplicate: int
    nonfinite: int
    malformed: int
    def __init__(self, stale: _Optional[int] = ..., lease_lost: _Optional[int] = ..., duplicate: _Optional[int] = ..., nonfinite: _Optional[int] = ..., malformed: _Optional[int] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("id", "name", "host", "platform", "devices", "state", "gradients", "examples_per_second", "staleness_mean", "pid", "compute_s", "connected_s", "staleness", "times", "leased", "transport")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    PLATFORM_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    STALENESS_MEAN_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_S_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    LEASED_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    id: int
    name: str
    host: str
    platform: str
    devices: int
    state: str
    gradients: int
    examples_per_second: float
    staleness_mean: float
    pid: int
    compute_s: float
    connected_s: float
    staleness: Staleness
    times: Times
    leased: int
    transport: str
    def __init__(self, id: _Optional[int] = ..., name: _Optional[str] = ..., host: _Optional[str] = ..., platform: _Optional[str] = ..., devices: _Optional[int] = ..., state: _Optional[str] = ..., gradients: _Optional[int] = ..., examples_per_second: _Optional[float] = ..., staleness_mean: _Optional[float] = ..., pid: _Optional[int] = ..., compute_s: _Optional[float] = ..., connected_s: _Optional[float] = ..., staleness: _Optional[_Union[Staleness, _Mapping]] = ..., times: _Optional[_Union[Times, _Mapping]] = ..., leased: _Optional[int] = ..., transport: _Optional[str] = ...) -> None: ...

class PauseRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResumeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SetRequest(_message.Message):
    __slots__ = ("values", "at_version")
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    VALUES_FIELD_NUMBER: _ClassVar[int]
    AT_VERSION_FIELD_NUMBER: _ClassVar[int]
    values: _containers.ScalarMap[str, str]
    at_version: int
    def __init__(self, values: _Optional[_Mapping[str, str]] = ..., at_version: _Optional[int] = ...) -> None: ...

class SettingsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SettingsReply(_message.Message):
    __slots__ = ("stamp", "settings", "message")
    STAMP_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    stamp: Stamp
    settings: _containers.RepeatedCompositeFieldContainer[Setting]
    message: str
    def __init__(self, stamp: _Optional[_Union[Stamp, _Mapping]] = ..., settings: _Optional[_Iterable[_Union[Setting, _Mapping]]] = ..., message: _Optional[str] = ...) -> None: ...

class Setting(_message.Message):
    __slots__ = ("name", "value", "is_set", "compiles", "planned")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    IS_SET_FIELD_NUMBER: _ClassVar[int]
    COMPILES_FIELD_NUMBER: _ClassVar[int]
    PLANNED_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: str
    is_set: bool
    compiles: bool
    planned: _containers.RepeatedCompositeFieldContainer[PlannedValue]
    def __init__(self, name: _Optional[str] = ..., value: _Optional[str] = ..., is_set: bool = ..., compiles: bool = ..., planned: _Optional[_Iterable[_Union[PlannedValue, _Mapping]]] = ...) -> None: ...

class PlannedValue(_message.Message):
    __slots__ = ("after_version", "value", "queued")
    AFTER_VERSION_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    after_version: int
    value: str
    queued: bool
    def __init__(self, after_version: _Optional[int] = ..., value: _Optional[str] = ..., queued: bool = ...) -> None: ...

class EvictRequest(_message.Message):
    __slots__ = ("worker",)
    WORKER_FIELD_NUMBER: _ClassVar[int]
    worker: str
    def __init__(self, worker: _Optional[str] = ...) -> None: ...

class SnapshotRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StopRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SteerReply(_message.Message):
    __slots__ = ("stamp", "message")
    STAMP_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    stamp: Stamp
    message: str
    def __init__(self, stamp: _Optional[_Union[Stamp, _Mapping]] = ..., message: _Optional[str] = ...) -> None: ...
