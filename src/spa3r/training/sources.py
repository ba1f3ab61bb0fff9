"""Sources of scenes and instruction data, as described in configuration files."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from spa3r.checks import check_types, shorten, signature_types
from spa3r.data.dataset_scenes import DatasetScenes, StreamedScenes
from spa3r.data.folders import FolderScenes
from spa3r.data.instructions import InstructionDataset, InstructionMixture, StreamedInstructions
from spa3r.data.scannet import ScanNetPPScenes, ScanNetScenes
from spa3r.data.source import SceneSource
from spa3r.data.videos import VideoScenes
from spa3r.rooms.instructions import RoomQuestions
from spa3r.rooms.scenes import RoomScenes

SOURCES: dict[str, type[SceneSource]] = {
    "folder": FolderScenes,
    "video": VideoScenes,
    "scannet": ScanNetScenes,
    "scannetpp": ScanNetPPScenes,
    "dataset": DatasetScenes,
    "rooms": RoomScenes,
}
"""The allowed values of `type`."""


def make_source(fields: Mapping[str, Any]) -> SceneSource:
    """Create the source that a configuration describes.

    Args:
        fields: `type`, one of ``folder``, ``video``, ``scannet``, ``scannetpp``, ``dataset`` and ``rooms``, and the
            arguments of that source. A ``dataset`` with ``streaming: true`` is streamed.

    Raises:
        ValueError: The type or a field is unknown, or a field is missing.
    """
    if not isinstance(fields, Mapping):
        raise ValueError(f"A source must be a section such as {{type: folder, root: photos}}, got {shorten(fields)}.")
    fields = dict(fields)
    kind = fields.pop("type", None)
    if not isinstance(kind, str) or kind not in SOURCES:
        raise ValueError(f"`type` of a source must be one of {', '.join(SOURCES)}, got {shorten(kind)}.")
    source, extra = SOURCES[kind], ["type"]
    if kind == "dataset":
        extra.append("streaming")
        check_types(fields, {"streaming": bool}, f"{kind}.")
        if fields.pop("streaming", False):
            source = StreamedScenes
    _check_fields(source, fields, f"A source of type {kind!r}", extra, f"{kind}.")
    return source(**fields)


def make_instructions(
    spec: Mapping[str, Any],
) -> InstructionDataset | StreamedInstructions | InstructionMixture | RoomQuestions:
    """Create the data set that a configuration describes.

    Args:
        spec: Arguments of :class:`~spa3r.data.InstructionDataset`, or with ``streaming: true`` of
            :class:`~spa3r.data.StreamedInstructions`; or ``type: room_questions`` and the arguments of
            :class:`~spa3r.rooms.instructions.RoomQuestions`; or ``mixture``, a mapping of names to such descriptions,
            each with an optional ``weight``, and beside it ``num_rows`` and ``seed`` of the mixture.

    Raises:
        ValueError: A field is unknown or missing; in a mixture only some parts have weights, or one is
            streamed.
    """
    if not isinstance(spec, Mapping):
        raise ValueError(f"Instruction data must be a section such as {{data: rows.json}}, got {shorten(spec)}.")
    spec = dict(spec)
    check_types(spec, {"streaming": bool, "mixture": dict[str, dict[str, Any]]})
    if "mixture" in spec:
        parts = {name: dict(fields) for name, fields in spec.pop("mixture").items()}
        for name, fields in parts.items():
            check_types(fields, {"weight": float}, f"{name}.")
        weights = {name: fields.pop("weight") for name, fields in parts.items() if "weight" in fields}
        if weights and len(weights) < len(parts):
            without = ", ".join(name for name in parts if name not in weights)
            raise ValueError(f"`weight` must stand in every part of a mixture or in none; {without} has none. Add it.")
        if streamed := [name for name, fields in parts.items() if fields.get("streaming")]:
            raise ValueError(f"`mixture` takes parts with random access, and {', '.join(streamed)} is streamed.")
        what = "A mixture of instruction data"
        _check_fields(InstructionMixture, spec, what, ("mixture",), "a mixture: ", given=("parts", "weights"))
        made = {name: make_instructions(fields | {"name": fields.get("name", name)}) for name, fields in parts.items()}
        return InstructionMixture(made, weights or None, **spec)
    kind = spec.pop("type", "instructions")
    if kind not in ("instructions", "room_questions"):
        raise ValueError(f"`type` of instruction data must be instructions or room_questions, got {shorten(kind)}.")
    streaming = kind == "instructions" and spec.pop("streaming", False)
    data = RoomQuestions if kind == "room_questions" else StreamedInstructions if streaming else InstructionDataset
    _check_fields(data, spec, f"Instruction data of type {kind!r}", ("type", "streaming"), f"{kind}: ")
    return data(**spec)


def _check_fields(
    made: type, fields: Mapping[str, Any], what: str, extra: Sequence[str], prefix: str, given: Sequence[str] = ()
) -> None:
    """Reject fields that a class doesn't take, missing ones, and values of wrong types.

    Args:
        made: The class.
        fields: Arguments of its constructor.
        what: What the fields describe, for the error.
        extra: Other fields that are known, for the error.
        prefix: Prefix of a field's name in an error about its type.
        given: Arguments that don't come from the fields.
    """
    known = {name: field for name, field in inspect.signature(made).parameters.items() if name not in given}
    if unknown := [name for name in fields if name not in known]:
        raise ValueError(f"{what} has no field {', '.join(map(repr, unknown))}. It has: {', '.join([*extra, *known])}.")
    if missing := [name for name, field in known.items() if field.default is field.empty and name not in fields]:
        raise ValueError(f"{what} needs {', '.join(map(repr, missing))}. Add it.")
    check_types(fields, signature_types(made), prefix)
