"""Export questions about rooms in the file layouts of the released data sets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import PIL.Image

from spa3r.data.dataset_scenes import require_datasets
from spa3r.disk import write_whole, writing
from spa3r.rooms.instructions import RoomQuestions
from spa3r.vsi_bench.format import make_prompt

SECONDS_PER_FRAME = 2
"""Time between two frames of an exported video: readers that sample a frame every two seconds, between 4 and 8 in
total, get all frames of a video of 4 to 8."""


def export_rooms(
    questions: RoomQuestions, output: str | Path, layout: Literal["vsi_590k", "vsi_bench"] = "vsi_590k"
) -> Path:
    """Write rooms and their questions in a released layout, so that readers of the real data can read them too.

    Next to the annotations there is a video of each room, ``rooms/<seed in seven digits>.mp4``, H.264, whose frames are
    the pictures that the questions refer to.

    Args:
        questions: The questions to write.
        output: The output folder; it is created if needed, and existing files are overwritten.
        layout: ``"vsi_590k"``: ``rooms.jsonl`` and the same rows as ``rooms.json``, each ``{"conversations": [{"from":
            "human", "value": "<image>\\n" + prompt}, {"from": "gpt", "value": truth}], "question_type", "video"}``.
            ``"vsi_bench"``: ``test.jsonl`` and the same rows as ``test.parquet``, each ``{id, dataset, scene_name,
            question_type, question, ground_truth, options}``.

    Returns:
        The annotation file: ``rooms.jsonl`` or ``test.parquet``.

    Raises:
        ValueError: The layout is unknown, or the pictures have an odd number of pixels on a side, which H.264 cannot
            store.
    """
    if layout not in ("vsi_590k", "vsi_bench"):
        raise ValueError(f'`layout` must be "vsi_590k" or "vsi_bench", got "{layout}". Take one of them.')
    if layout == "vsi_bench":
        require_datasets()
    output = Path(output)
    rows = [questions.row(index) for index in range(questions.num_questions)]
    with writing(output):
        return _write(questions, rows, output, layout)


def _write(questions: RoomQuestions, rows: list[dict[str, Any]], output: Path, layout: str) -> Path:
    (output / "rooms").mkdir(parents=True, exist_ok=True)
    for scene in sorted({row["scene_name"] for row in rows}):
        _write_video(output / "rooms" / f"{scene}.mp4", questions.pictures(int(scene)))
    if layout == "vsi_590k":
        rows = [_conversation(row) for row in rows]
        write_whole(output / "rooms.json", json.dumps(rows, indent=1))
        _write_lines(output / "rooms.jsonl", rows)
        return output / "rooms.jsonl"
    _write_lines(output / "test.jsonl", rows)
    require_datasets().Dataset.from_list(rows).to_parquet(output / "test.parquet")
    return output / "test.parquet"


def _conversation(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "conversations": [
            {"from": "human", "value": f"<image>\n{make_prompt(row)}"},
            {"from": "gpt", "value": row["ground_truth"]},
        ],
        "question_type": row["question_type"],
        "video": f"{row['dataset']}/{row['scene_name']}.mp4",
    }


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def _write_video(path: Path, frames: Sequence[PIL.Image.Image]) -> None:
    if any(side % 2 for side in frames[0].size):
        raise ValueError(
            f"`size` must be even, H.264 stores no odd sides, got pictures of {frames[0].size[0]} x "
            f"{frames[0].size[1]} pixels. Take rooms of another `size`."
        )
    with av.open(str(path), "w") as container:
        # All frames are key frames of high quality: they are few and differ strongly.
        options = {"crf": "8", "g": "1"}
        stream = container.add_stream("libx264", rate=Fraction(1, SECONDS_PER_FRAME), options=options)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode(None))
