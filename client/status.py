"""A status reply as plain Python values, named as in the .proto."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message

from headwater.protos import parameter_server_pb2 as pb

Status = dict[str, Any]
"""Keyed by the fields of `StatusReply` in parameter_server.proto, where each is
explained; the stamp's three stand beside them. A value that is not known is None."""

OVER = ("finished", "failed", "stopping")
"""States after which nothing changes any more."""

OF_SESSIONS = ("session", "pushing")
"""States of push sessions, which stand among the workers and take no batches."""


def as_dict(reply: pb.StatusReply) -> Status:
    """The reply with enums as lower-case words, such as state "training"."""
    values = values_of(reply)
    return {**values.pop("stamp"), **values}


def values_of(message: Message) -> dict[str, Any]:
    """The fields of any message, likewise."""
    return {field.name: _value(message, field) for field in message.DESCRIPTOR.fields}


def _value(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return dict(sorted(value.items()))
    if field.is_repeated:
        return [values_of(item) if isinstance(item, Message) else item for item in value]
    if field.has_presence and field.message_type is None and not message.HasField(field.name):
        return None
    if field.message_type is not None:
        return values_of(value)
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return known.name.partition("_")[2].lower() if known else f"unknown ({value})"
    return value
