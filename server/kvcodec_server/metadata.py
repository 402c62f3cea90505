"""The typed view of a page's header: between the messages and what they stand for, both ways."""

from __future__ import annotations

from itertools import product

from kvcodec.errors import ConfigError
from kvcodec.format import MAJOR, PageHeader
from kvcodec.identity import Identity, Namespace
from kvcodec.layout import DType, PageLayout, Role, Stream
from kvcodec_proto.v1 import pages_pb2 as pb

__all__ = [
    "identity_message",
    "identity_of",
    "layout_message",
    "layout_of",
    "metadata_of",
    "namespace_of",
]


def metadata_of(header: PageHeader) -> pb.PageMetadata:
    """What a verified header says."""
    layout = header.layout
    places = product(
        range(layout.layer_start, layout.layer_start + layout.layer_count), layout.streams
    )
    return pb.PageMetadata(
        format_major=MAJOR,
        format_minor=header.minor,
        identity=identity_message(header.identity),
        key=header.key,
        layout=layout_message(layout),
        sections=[
            pb.Section(
                layer_index=layer,
                role=f"ROLE_{stream.role.name}",
                codec=codec.text,
                stored_bytes=stored,
                checksum=checksum,
            )
            for (layer, stream), codec, stored, checksum in zip(
                places, header.codecs, header.stored_bytes, header.checksums, strict=True
            )
        ],
        header_bytes=header.header_bytes,
        page_bytes=header.page_bytes,
        raw_bytes=layout.raw_bytes,
        minimum_bits=header.minimum_bits,
    )


def layout_message(layout: PageLayout) -> pb.PageLayout:
    """A layout as a message."""
    return pb.PageLayout(
        dtype=f"ELEMENT_TYPE_{layout.dtype.name}",
        token_count=layout.token_count,
        layer_count=layout.layer_count,
        layer_start=layout.layer_start,
        streams=[
            pb.Stream(
                role=f"ROLE_{stream.role.name}",
                head_count=stream.head_count,
                head_size=stream.head_size,
                head_start=stream.head_start,
            )
            for stream in layout.streams
        ],
    )


def layout_of(message: pb.PageLayout) -> PageLayout:
    """The layout a message says. Raises `ConfigError` for an impossible one."""
    try:
        return PageLayout(
            dtype=DType(message.dtype),
            token_count=message.token_count,
            layer_count=message.layer_count,
            layer_start=message.layer_start,
            streams=tuple(
                Stream(Role(s.role), s.head_count, s.head_size, s.head_start)
                for s in message.streams
            ),
        )
    except ConfigError:
        raise
    except ValueError as error:  # of an enum; the format's numbers are the messages' numbers
        raise ConfigError(f"impossible layout: {error}") from error


def identity_message(identity: Identity) -> pb.Identity:
    """An identity as a message."""
    fields = [pb.IdentityField(name=name, value=value) for name, value in identity.fields]
    return pb.Identity(fields=fields)


def identity_of(message: pb.Identity) -> Identity:
    """The identity a message says. Raises `ConfigError` for an impossible one."""
    return Identity(tuple((field.name, field.value) for field in message.fields))


def namespace_of(identity: pb.Identity, layout: pb.PageLayout) -> Namespace:
    """Where pages of an identity and a layout belong. Raises `ConfigError`."""
    return Namespace(identity_of(identity), layout_of(layout))
