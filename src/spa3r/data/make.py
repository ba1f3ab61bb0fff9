"""Sources as configuration files describe them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from spa3r.checks import check_types, shorten, signature_types
from spa3r.data.dataset_scenes import DatasetScenes, StreamedScenes
from spa3r.data.folders import FolderScenes
from spa3r.data.room_scenes import RoomScenes
from spa3r.data.scannet import ScanNetPPScenes, ScanNetScenes
from spa3r.data.source import SceneSource
from spa3r.data.videos import VideoScenes

SOURCES: dict[str, type[SceneSource]] = {
    "folder": FolderScenes,
    "video": VideoScenes,
    "scannet": ScanNetScenes,
    "scannetpp": ScanNetPPScenes,
    "dataset": DatasetScenes,
    "rooms": RoomScenes,
}
"""The value of `type` of every source."""


def make_source(fields: Mapping[str, Any]) -> SceneSource:
    """The source that a configuration describes.

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
    source, extra = SOURCES[kind], []
    if kind == "dataset":
        extra = ["streaming"]
        check_types(fields, {"streaming": bool}, f"{kind}.")
        if fields.pop("streaming", False):
            source = StreamedScenes
    known = inspect.signature(source).parameters
    if unknown := [name for name in fields if name not in known]:
        raise ValueError(
            f"A source of type {kind!r} has no field {', '.join(map(repr, unknown))}. It has: type, "
            f"{', '.join([*known, *extra])}."
        )
    if missing := [name for name, field in known.items() if field.default is field.empty and name not in fields]:
        raise ValueError(f"A source of type {kind!r} needs {', '.join(map(repr, missing))}. Add it.")
    check_types(fields, signature_types(source), f"{kind}.")
    return source(**fields)
