from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ElementType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ELEMENT_TYPE_UNSPECIFIED: _ClassVar[ElementType]
    ELEMENT_TYPE_BF16: _ClassVar[ElementType]
    ELEMENT_TYPE_FP16: _ClassVar[ElementType]
    ELEMENT_TYPE_FP32: _ClassVar[ElementType]
    ELEMENT_TYPE_FP8_E4M3: _ClassVar[ElementType]
    ELEMENT_TYPE_FP8_E5M2: _ClassVar[ElementType]
    ELEMENT_TYPE_U8: _ClassVar[ElementType]

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_KEY: _ClassVar[Role]
    ROLE_VALUE: _ClassVar[Role]
    ROLE_LATENT: _ClassVar[Role]
    ROLE_ROPE: _ClassVar[Role]
    ROLE_OPAQUE: _ClassVar[Role]
ELEMENT_TYPE_UNSPECIFIED: ElementType
ELEMENT_TYPE_BF16: ElementType
ELEMENT_TYPE_FP16: ElementType
ELEMENT_TYPE_FP32: ElementType
ELEMENT_TYPE_FP8_E4M3: ElementType
ELEMENT_TYPE_FP8_E5M2: ElementType
ELEMENT_TYPE_U8: ElementType
ROLE_UNSPECIFIED: Role
ROLE_KEY: Role
ROLE_VALUE: Role
ROLE_LATENT: Role
ROLE_ROPE: Role
ROLE_OPAQUE: Role

class Stream(_message.Message):
    __slots__ = ("role", "head_count", "head_size", "head_start")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    HEAD_COUNT_FIELD_NUMBER: _ClassVar[int]
    HEAD_SIZE_FIELD_NUMBER: _ClassVar[int]
    HEAD_START_FIELD_NUMBER: _ClassVar[int]
    role: Role
    head_count: int
    head_size: int
    head_start: int
    def __init__(self, role: _Optional[_Union[Role, str]] = ..., head_count: _Optional[int] = ..., head_size: _Optional[int] = ..., head_start: _Optional[int] = ...) -> None: ...

class PageLayout(_message.Message):
    __slots__ = ("dtype", "token_count", "layer_count", "layer_start", "streams")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    LAYER_COUNT_FIELD_NUMBER: _ClassVar[int]
    LAYER_START_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    dtype: ElementType
    token_count: int
    layer_count: int
    layer_start: int
    streams: _containers.RepeatedCompositeFieldContainer[Stream]
    def __init__(self, dtype: _Optional[_Union[ElementType, str]] = ..., token_count: _Optional[int] = ..., layer_count: _Optional[int] = ..., layer_start: _Optional[int] = ..., streams: _Optional[_Iterable[_Union[Stream, _Mapping]]] = ...) -> None: ...

class IdentityField(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: str
    def __init__(self, name: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...

class Identity(_message.Message):
    __slots__ = ("fields",)
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    fields: _containers.RepeatedCompositeFieldContainer[IdentityField]
    def __init__(self, fields: _Optional[_Iterable[_Union[IdentityField, _Mapping]]] = ...) -> None: ...

class Section(_message.Message):
    __slots__ = ("layer_index", "role", "codec", "stored_bytes", "checksum")
    LAYER_INDEX_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    layer_index: int
    role: Role
    codec: str
    stored_bytes: int
    checksum: int
    def __init__(self, layer_index: _Optional[int] = ..., role: _Optional[_Union[Role, str]] = ..., codec: _Optional[str] = ..., stored_bytes: _Optional[int] = ..., checksum: _Optional[int] = ...) -> None: ...

class PageMetadata(_message.Message):
    __slots__ = ("format_major", "format_minor", "identity", "key", "layout", "sections", "header_bytes", "page_bytes", "raw_bytes", "minimum_bits")
    FORMAT_MAJOR_FIELD_NUMBER: _ClassVar[int]
    FORMAT_MINOR_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    SECTIONS_FIELD_NUMBER: _ClassVar[int]
    HEADER_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    RAW_BYTES_FIELD_NUMBER: _ClassVar[int]
    MINIMUM_BITS_FIELD_NUMBER: _ClassVar[int]
    format_major: int
    format_minor: int
    identity: Identity
    key: str
    layout: PageLayout
    sections: _containers.RepeatedCompositeFieldContainer[Section]
    header_bytes: int
    page_bytes: int
    raw_bytes: int
    minimum_bits: int
    def __init__(self, format_major: _Optional[int] = ..., format_minor: _Optional[int] = ..., identity: _Optional[_Union[Identity, _Mapping]] = ..., key: _Optional[str] = ..., layout: _Optional[_Union[PageLayout, _Mapping]] = ..., sections: _Optional[_Iterable[_Union[Section, _Mapping]]] = ..., header_bytes: _Optional[int] = ..., page_bytes: _Optional[int] = ..., raw_bytes: _Optional[int] = ..., minimum_bits: _Optional[int] = ...) -> None: ...
