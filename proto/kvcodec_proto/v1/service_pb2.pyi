from kvcodec_proto.v1 import pages_pb2 as _pages_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STATUS_UNSPECIFIED: _ClassVar[Status]
    STATUS_OK: _ClassVar[Status]
    STATUS_NOT_FOUND: _ClassVar[Status]
    STATUS_TOO_LONG: _ClassVar[Status]
    STATUS_BACKEND_ERROR: _ClassVar[Status]
    STATUS_BACKEND_FULL: _ClassVar[Status]
    STATUS_BACKEND_READ_ONLY: _ClassVar[Status]
    STATUS_BACKEND_TIMEOUT: _ClassVar[Status]
    STATUS_PAGE_ERROR: _ClassVar[Status]
    STATUS_CORRUPT_PAGE: _ClassVar[Status]
    STATUS_UNSUPPORTED_PAGE: _ClassVar[Status]
    STATUS_MISMATCHED_PAGE: _ClassVar[Status]
    STATUS_QUALITY_BELOW_MINIMUM: _ClassVar[Status]
    STATUS_UNDECODED_PAGE: _ClassVar[Status]
    STATUS_CONFIG_ERROR: _ClassVar[Status]
    STATUS_NATIVE_ERROR: _ClassVar[Status]
    STATUS_KVCODEC_ERROR: _ClassVar[Status]
STATUS_UNSPECIFIED: Status
STATUS_OK: Status
STATUS_NOT_FOUND: Status
STATUS_TOO_LONG: Status
STATUS_BACKEND_ERROR: Status
STATUS_BACKEND_FULL: Status
STATUS_BACKEND_READ_ONLY: Status
STATUS_BACKEND_TIMEOUT: Status
STATUS_PAGE_ERROR: Status
STATUS_CORRUPT_PAGE: Status
STATUS_UNSUPPORTED_PAGE: Status
STATUS_MISMATCHED_PAGE: Status
STATUS_QUALITY_BELOW_MINIMUM: Status
STATUS_UNDECODED_PAGE: Status
STATUS_CONFIG_ERROR: Status
STATUS_NATIVE_ERROR: Status
STATUS_KVCODEC_ERROR: Status

class Outcome(_message.Message):
    __slots__ = ("status", "length", "detail", "what", "metadata", "found", "expected")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    status: Status
    length: int
    detail: str
    what: str
    metadata: _pages_pb2.PageMetadata
    found: str
    expected: str
    def __init__(self, status: _Optional[_Union[Status, str]] = ..., length: _Optional[int] = ..., detail: _Optional[str] = ..., what: _Optional[str] = ..., metadata: _Optional[_Union[_pages_pb2.PageMetadata, _Mapping]] = ..., found: _Optional[str] = ..., expected: _Optional[str] = ...) -> None: ...

class RawPages(_message.Message):
    __slots__ = ("identity", "layout", "spec", "minimum_bits")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    MINIMUM_BITS_FIELD_NUMBER: _ClassVar[int]
    identity: _pages_pb2.Identity
    layout: _pages_pb2.PageLayout
    spec: str
    minimum_bits: int
    def __init__(self, identity: _Optional[_Union[_pages_pb2.Identity, _Mapping]] = ..., layout: _Optional[_Union[_pages_pb2.PageLayout, _Mapping]] = ..., spec: _Optional[str] = ..., minimum_bits: _Optional[int] = ...) -> None: ...

class ObjectRange(_message.Message):
    __slots__ = ("name", "offset", "length")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    name: str
    offset: int
    length: int
    def __init__(self, name: _Optional[str] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class GetRequest(_message.Message):
    __slots__ = ("call_id", "objects", "with_metadata", "raw")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    WITH_METADATA_FIELD_NUMBER: _ClassVar[int]
    RAW_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    objects: _containers.RepeatedCompositeFieldContainer[ObjectRange]
    with_metadata: bool
    raw: RawPages
    def __init__(self, call_id: _Optional[int] = ..., objects: _Optional[_Iterable[_Union[ObjectRange, _Mapping]]] = ..., with_metadata: bool = ..., raw: _Optional[_Union[RawPages, _Mapping]] = ...) -> None: ...

class GetResponse(_message.Message):
    __slots__ = ("outcomes", "unfinished")
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    UNFINISHED_FIELD_NUMBER: _ClassVar[int]
    outcomes: _containers.RepeatedCompositeFieldContainer[Outcome]
    unfinished: bool
    def __init__(self, outcomes: _Optional[_Iterable[_Union[Outcome, _Mapping]]] = ..., unfinished: bool = ...) -> None: ...

class PutRequest(_message.Message):
    __slots__ = ("call_id", "objects", "raw")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    RAW_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    objects: _containers.RepeatedCompositeFieldContainer[ObjectRange]
    raw: RawPages
    def __init__(self, call_id: _Optional[int] = ..., objects: _Optional[_Iterable[_Union[ObjectRange, _Mapping]]] = ..., raw: _Optional[_Union[RawPages, _Mapping]] = ...) -> None: ...

class PutResponse(_message.Message):
    __slots__ = ("outcomes", "unfinished")
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    UNFINISHED_FIELD_NUMBER: _ClassVar[int]
    outcomes: _containers.RepeatedCompositeFieldContainer[Outcome]
    unfinished: bool
    def __init__(self, outcomes: _Optional[_Iterable[_Union[Outcome, _Mapping]]] = ..., unfinished: bool = ...) -> None: ...

class ObjectRoom(_message.Message):
    __slots__ = ("name", "capacity")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    name: str
    capacity: int
    def __init__(self, name: _Optional[str] = ..., capacity: _Optional[int] = ...) -> None: ...

class GetStreamRequest(_message.Message):
    __slots__ = ("objects", "with_metadata", "raw")
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    WITH_METADATA_FIELD_NUMBER: _ClassVar[int]
    RAW_FIELD_NUMBER: _ClassVar[int]
    objects: _containers.RepeatedCompositeFieldContainer[ObjectRoom]
    with_metadata: bool
    raw: RawPages
    def __init__(self, objects: _Optional[_Iterable[_Union[ObjectRoom, _Mapping]]] = ..., with_metadata: bool = ..., raw: _Optional[_Union[RawPages, _Mapping]] = ...) -> None: ...

class GetStreamResponse(_message.Message):
    __slots__ = ("outcome", "chunk")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    outcome: Outcome
    chunk: bytes
    def __init__(self, outcome: _Optional[_Union[Outcome, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class PutStreamHeader(_message.Message):
    __slots__ = ("raw",)
    RAW_FIELD_NUMBER: _ClassVar[int]
    raw: RawPages
    def __init__(self, raw: _Optional[_Union[RawPages, _Mapping]] = ...) -> None: ...

class ObjectStart(_message.Message):
    __slots__ = ("name", "length")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    name: str
    length: int
    def __init__(self, name: _Optional[str] = ..., length: _Optional[int] = ...) -> None: ...

class PutStreamRequest(_message.Message):
    __slots__ = ("header", "start", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: PutStreamHeader
    start: ObjectStart
    chunk: bytes
    def __init__(self, header: _Optional[_Union[PutStreamHeader, _Mapping]] = ..., start: _Optional[_Union[ObjectStart, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class PutStreamResponse(_message.Message):
    __slots__ = ("outcomes",)
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    outcomes: _containers.RepeatedCompositeFieldContainer[Outcome]
    def __init__(self, outcomes: _Optional[_Iterable[_Union[Outcome, _Mapping]]] = ...) -> None: ...

class ExistsRequest(_message.Message):
    __slots__ = ("names",)
    NAMES_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, names: _Optional[_Iterable[str]] = ...) -> None: ...

class ExistsResponse(_message.Message):
    __slots__ = ("exists",)
    EXISTS_FIELD_NUMBER: _ClassVar[int]
    exists: _containers.RepeatedScalarFieldContainer[bool]
    def __init__(self, exists: _Optional[_Iterable[bool]] = ...) -> None: ...

class ExistsPrefixRequest(_message.Message):
    __slots__ = ("names",)
    NAMES_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, names: _Optional[_Iterable[str]] = ...) -> None: ...

class ExistsPrefixResponse(_message.Message):
    __slots__ = ("count",)
    COUNT_FIELD_NUMBER: _ClassVar[int]
    count: int
    def __init__(self, count: _Optional[int] = ...) -> None: ...

class DeleteRequest(_message.Message):
    __slots__ = ("names",)
    NAMES_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, names: _Optional[_Iterable[str]] = ...) -> None: ...

class DeleteResponse(_message.Message):
    __slots__ = ("deleted",)
    DELETED_FIELD_NUMBER: _ClassVar[int]
    deleted: _containers.RepeatedScalarFieldContainer[bool]
    def __init__(self, deleted: _Optional[_Iterable[bool]] = ...) -> None: ...

class StatRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class StoredObject(_message.Message):
    __slots__ = ("name", "stored_bytes", "modified_seconds")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MODIFIED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    stored_bytes: int
    modified_seconds: float
    def __init__(self, name: _Optional[str] = ..., stored_bytes: _Optional[int] = ..., modified_seconds: _Optional[float] = ...) -> None: ...

class StatResponse(_message.Message):
    __slots__ = ("object",)
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    object: StoredObject
    def __init__(self, object: _Optional[_Union[StoredObject, _Mapping]] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ("prefix",)
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    prefix: str
    def __init__(self, prefix: _Optional[str] = ...) -> None: ...

class ListResponse(_message.Message):
    __slots__ = ("objects",)
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    objects: _containers.RepeatedCompositeFieldContainer[StoredObject]
    def __init__(self, objects: _Optional[_Iterable[_Union[StoredObject, _Mapping]]] = ...) -> None: ...

class InspectRequest(_message.Message):
    __slots__ = ("names", "verify")
    NAMES_FIELD_NUMBER: _ClassVar[int]
    VERIFY_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    verify: bool
    def __init__(self, names: _Optional[_Iterable[str]] = ..., verify: bool = ...) -> None: ...

class InspectResponse(_message.Message):
    __slots__ = ("outcomes",)
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    outcomes: _containers.RepeatedCompositeFieldContainer[Outcome]
    def __init__(self, outcomes: _Optional[_Iterable[_Union[Outcome, _Mapping]]] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsResponse(_message.Message):
    __slots__ = ("counters", "sessions", "calls", "region_bytes")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    REGION_BYTES_FIELD_NUMBER: _ClassVar[int]
    counters: _containers.ScalarMap[str, int]
    sessions: int
    calls: int
    region_bytes: int
    def __init__(self, counters: _Optional[_Mapping[str, int]] = ..., sessions: _Optional[int] = ..., calls: _Optional[int] = ..., region_bytes: _Optional[int] = ...) -> None: ...
