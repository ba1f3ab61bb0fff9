"""Instruction data: the released layouts, written with real pictures and videos, read as conversations."""

import json
import pickle

import datasets
import numpy as np
import PIL.Image
import pytest
from media import asked, write_video
from torch.utils.data import DataLoader

from spa3r.data import InstructionDataset, InstructionMixture, StreamedInstructions
from spa3r.data.instructions import _json_rows
from spa3r.rooms.instructions import RoomQuestions
from spa3r.training.sources import make_instructions


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_picture(path, shade: int, size=(28, 42)):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", size, (shade, shade, shade)).save(path)


def write_walk(path, seconds: float, rate: int = 4):
    """A video whose frame i is as bright as 5 i."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = [PIL.Image.new("RGB", (32, 32), (5 * index,) * 3) for index in range(int(seconds * rate))]
    write_video(path, frames, rate)


def write_lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def shown(example) -> list[str]:
    """The conversation in short: I for a picture, otherwise the text."""
    return [
        item if isinstance(item, str) else "I" if item["type"] == "image" else item["text"]
        for message in example["messages"]
        for item in ([message["content"]] if isinstance(message["content"], str) else message["content"])
    ]


def shades(example) -> list[int]:
    return [
        round(np.asarray(item["image"]).mean())
        for message in example["messages"]
        for item in message["content"]
        if item["type"] == "image"
    ]


def test_vsi_590k_video_and_image(tmp_path):
    write_walk(tmp_path / "src/a.mp4", seconds=10)
    write_picture(tmp_path / "src/b.jpg", 200)
    rows = [
        {
            "conversations": asked("<image>\nThese are frames of a video.\nHow many chairs?"),
            "question_type": "object_counting",
            "video": "src/a.mp4",
        },
        {"conversations": asked("<image>\nHow many?"), "question_type": "object_counting", "image": "src/b.jpg"},
        {"conversations": asked("What is 2 + 2?")},
    ]
    data = InstructionDataset(write_lines(tmp_path / "vsi.jsonl", rows))
    assert len(data) == 3
    video, picture, text = data
    assert shown(video) == ["I"] * 5 + ["These are frames of a video.\nHow many chairs?", "4."]
    # linspace(0, 39, 5) of frames that are 5 shades apart
    assert np.allclose(shades(video), [0, 45, 95, 145, 195], atol=4)
    assert shown(picture) == ["I", "How many?", "4."] and shades(picture) == [200]
    assert shown(text) == ["What is 2 + 2?", "4."]
    assert [message["role"] for message in video["messages"]] == ["user", "assistant"]
    assert (video["source"], video["row"], video["question_type"]) == ("vsi", "0", "object_counting")
    assert video["skipped"] == [] and text["question_type"] is None


@pytest.mark.parametrize(("seconds", "expected"), [(2, 4), (8, 4), (11, 6), (12, 6), (40, 8)])
def test_frames_by_the_length_of_the_video(tmp_path, seconds, expected):
    write_walk(tmp_path / "a.mp4", seconds, rate=1)
    rows = [{"conversations": asked("<image>\nHow many?"), "video": "a.mp4"}]
    file = write_lines(tmp_path / "a.jsonl", rows)
    assert shown(InstructionDataset(file)[0]).count("I") == expected
    assert shown(InstructionDataset(file, num_frames=3)[0]).count("I") == 3
    by_rule = InstructionDataset(file, frames=(1, 32), seconds_per_frame=1)
    assert shown(by_rule[0]).count("I") == min(seconds, 32)


def test_spar_several_pictures(tmp_path):
    for index in range(3):
        write_picture(tmp_path / f"spar/{index}.jpg", 50 * index)
    row = {
        "id": "s7",
        "conversations": asked("<image>\n<image>\nWhich is nearer than in <image>?"),
        "images": [f"{index}.jpg" for index in range(3)],
    }
    (tmp_path / "spar.json").write_text(json.dumps([row]))
    example = InstructionDataset(tmp_path / "spar.json", tmp_path / "spar")[0]
    assert shown(example) == ["I", "I", "Which is nearer than in", "I", "?", "4."]
    assert shades(example) == [0, 50, 100] and example["row"] == "s7"


def test_llava_hound_folder_of_frames_in_natural_order(tmp_path):
    for index in range(12):
        write_picture(tmp_path / f"frames/v1/{index}.jpeg", 10 * index)
    row = {"id": 3, "conversations": asked("<video>\nWhat happens?"), "video": "frames/v1"}
    example = InstructionDataset(write_lines(tmp_path / "hound.jsonl", [row]))[0]
    assert shown(example) == ["I"] * 8 + ["What happens?", "4."]
    assert shades(example) == [10 * int(index) for index in np.linspace(0, 11, 8).astype(int)]


def test_vlm_3r_placeholders_one_for_each_frame(tmp_path):
    write_walk(tmp_path / "scannet/a.mp4", seconds=4)
    row = {"conversations": asked("<image><image><image>\nHow far?"), "video": "scannet/a.mp4"}
    example = InstructionDataset(write_lines(tmp_path / "vlm3r.jsonl", [row]))[0]
    assert shown(example) == ["I"] * 4 + ["How far?", "4."]


@pytest.mark.parametrize("kind", [InstructionDataset, StreamedInstructions])
def test_a_folder_of_json_beside_its_media(tmp_path, kind):
    """As VSI-590K lies on disk; `datasets` alone would see a folder of videos."""
    folder = tmp_path / "VSI-590K"
    for name in "abc":
        write_walk(folder / f"src/{name}.mp4", seconds=4)
    rows = [{"conversations": asked("<image>\nHow many?"), "video": f"src/{name}.mp4"} for name in "ab"]
    write_lines(folder / "vsi_590k.jsonl", rows)
    (folder / "README.md").write_text("# VSI-590K\n")
    data = list(kind(folder))
    assert [shown(example) for example in data] == [["I"] * 4 + ["How many?", "4."]] * 2
    assert data[0]["source"] == "vsi_590k"
    write_lines(folder / "more.jsonl", rows)
    with pytest.raises(ValueError, match="Name the file of the annotations"):  # which of the two?
        kind(folder)
    write_lines(folder / "train.jsonl", rows[:1])
    assert len(list(kind(folder))) == 1


def test_a_video_inside_parquet(tmp_path):
    write_walk(tmp_path / "a.mp4", seconds=10)
    features = datasets.Features(
        {
            "conversations": datasets.List({"from": datasets.Value("string"), "value": datasets.Value("string")}),
            "video": datasets.Video(decode=False),
        }
    )
    row = {
        "conversations": asked("<video>\nHow many?"),
        "video": {"bytes": (tmp_path / "a.mp4").read_bytes(), "path": "a.mp4"},
    }
    datasets.Dataset.from_list([row], features=features).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "a.mp4").unlink()
    example = InstructionDataset(tmp_path / "rows.parquet")[0]
    assert shown(example) == ["I"] * 5 + ["How many?", "4."]
    assert np.allclose(shades(example), [0, 45, 95, 145, 195], atol=4)


def test_messages_with_pictures_in_parquet_and_a_hub_layout(tmp_path):
    pictures = [PIL.Image.new("RGB", (28, 28), (shade,) * 3) for shade in (40, 80)]
    content = [{"type": "image", "text": None}, {"type": "image", "text": None}, {"type": "text", "text": "Which?"}]
    answer = [{"type": "text", "text": "The second."}]
    rows = datasets.Dataset.from_dict(
        {
            "messages": [[{"role": "user", "content": content}, {"role": "assistant", "content": answer}]],
            "images": [pictures],
        },
        features=datasets.Features(
            {
                "messages": datasets.List(
                    {
                        "role": datasets.Value("string"),
                        "content": datasets.List({"type": datasets.Value("string"), "text": datasets.Value("string")}),
                    }
                ),
                "images": datasets.List(datasets.Image()),
            }
        ),
    )
    (tmp_path / "hub/data").mkdir(parents=True)
    rows.to_parquet(tmp_path / "hub/data/train-00000-of-00001.parquet")
    for data in (
        InstructionDataset(tmp_path / "hub"),
        InstructionDataset(str(tmp_path / "hub/data/train-00000-of-00001.parquet")),
        InstructionDataset(rows),
        list(StreamedInstructions(tmp_path / "hub")),
    ):
        assert shown(data[0]) == ["I", "I", "Which?", "The second."]
        assert np.allclose(shades(data[0]), [40, 80], atol=1)


def test_plain_messages_and_pictures_without_a_place(tmp_path):
    write_picture(tmp_path / "a.png", 9)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A wall."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    example = InstructionDataset(write_lines(tmp_path / "a.jsonl", [{"messages": messages, "image": "a.png"}]))[0]
    assert shown(example) == ["Be brief.", "I", "What is it?", "A wall.", "Sure?", "Yes."]
    inside = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "And this?"}]
    row = {"messages": [{"role": "user", "content": inside}, {"role": "assistant", "content": "A wall."}]}
    assert shown(InstructionDataset(write_lines(tmp_path / "b.jsonl", [row]))[0]) == ["I", "And this?", "A wall."]


def broken(tmp_path, bad: int = 3):
    """Rows 0 to bad - 1 can't be used, each for a reason of its own; the others can."""
    write_picture(tmp_path / "a.png", 9)
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    (tmp_path / "cut.mp4").write_bytes(b"no video")
    (tmp_path / "empty").mkdir()
    ask = asked("<image>\nHow many?")
    rows = [
        {"conversations": ask, "image": "missing.png"},
        {"conversations": ask, "image": "cut.jpg"},
        {"conversations": ask, "video": "cut.mp4"},
        {"conversations": ask, "video": "empty"},
        {"conversations": asked("<image> <image> <image>"), "images": ["a.png", "a.png"]},
        {"conversations": ask[:1], "image": "a.png"},
        {"question": "How many?"},
        {"conversations": [{"from": "narrator", "value": "Once."}]},
        {"conversations": [{"from": "human", "value": [{"type": "audio"}]}, ask[1]]},
        {"conversations": ["How many?"]},
        {"conversations": ask, "video": 7},
        {"conversations": ask},
        {"conversations": ask, "image": ""},
    ]
    good = [{"conversations": asked(f"<image>\n{index}?"), "image": "a.png"} for index in range(3)]
    return write_lines(tmp_path / "broken.jsonl", rows[:bad] + good)


def test_broken_rows_are_replaced_and_named(tmp_path):
    file = broken(tmp_path, 13)
    file.write_text('{"conversations": [\n[1]\n' + file.read_text())
    data = InstructionDataset(file)
    example = data[0]
    assert shown(example) == ["I", "0?", "4."] and example["row"] == "15"
    skipped = example["skipped"]
    assert [entry["scene"] for entry in skipped] == [str(row) for row in range(15)]
    assert [entry["picture"] for entry in skipped][2:6] == ["missing.png", "cut.jpg", "cut.mp4", "empty"]
    for entry, words in zip(
        skipped,
        (
            "it is no JSON",
            "must be a JSON object, got list",
            "doesn't exist",
            "cut.jpg",
            "cut.mp4 can't be decoded",
            "the folder holds no pictures",
            "3 places for media",
            "nothing to learn",
            "`messages` or `conversations`",
            "narrator",
            "type text, image or video, got 'audio'",
            "`conversations` must be a list of messages",
            "must be a path, got int",
            "1 places for media (<image> or <video>) in the text, and 0 media",
            "1 places for media (<image> or <video>) in the text, and 0 media",
        ),
        strict=True,
    ):
        assert words in entry["reason"]
        assert entry["source"] == "broken"
    assert data[16]["skipped"] == []
    assert shown(data[-1]) == shown(data[17]) == ["I", "2?", "4."]
    assert len(data.lengths) == 18 and list(data.lengths[:2]) == [0, 0]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-8"])
@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_no_row_is_lost_to_the_encoding(kind, encoding, tmp_path):
    """As editors and shells of Windows write: with a byte-order mark, and two bytes for a character."""
    rows = [{"id": f"é{n}", "conversations": asked(f"Wie groß ist Stühle {n}?")} for n in range(3)]
    text = json.dumps(rows, ensure_ascii=False)
    if kind == "jsonl":
        text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / f"rows.{kind}").write_bytes(text.encode(encoding))
    for data in (InstructionDataset(tmp_path / f"rows.{kind}"), StreamedInstructions(tmp_path / f"rows.{kind}")):
        examples = [data[i] for i in range(3)] if isinstance(data, InstructionDataset) else list(data)
        assert [example["row"] for example in examples] == ["é0", "é1", "é2"]
        assert shown(examples[2]) == ["Wie groß ist Stühle 2?", "4."] and not examples[0]["skipped"]


def test_another_encoding_is_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(json.dumps({"conversations": asked("groß?")}, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(ValueError, match=r"rows.jsonl must be text in UTF-8, .* got other bytes .* Save it as UTF-8"):
        InstructionDataset(file)


def test_numbers_are_answers(tmp_path):
    item = [{"type": "text", "text": 3}]
    write_lines(
        tmp_path / "rows.jsonl",
        [
            {"conversations": asked("How many?", 4)},
            {"conversations": asked("How far?", 2.5)},
            {"conversations": asked(7, 0)},
            {"messages": [{"role": "user", "content": [3, "?"]}, {"role": "assistant", "content": 3}]},
            {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": item}]},
        ],
    )
    data = InstructionDataset(tmp_path / "rows.jsonl")
    assert [data[i]["skipped"] for i in range(5)] == [[]] * 5
    assert [shown(data[i])[-1] for i in range(5)] == ["4", "2.5", "0", "3", "3"]
    assert shown(data[2]) == ["7", "0"] and shown(data[3]) == ["3", "?", "3"]


def test_rows_of_any_form_end_nothing(tmp_path):
    """What is no answer, and what no reader expects."""
    good = {"conversations": asked("How many?")}
    bad = [
        {"conversations": asked("How many?", True)},
        {"conversations": asked("How many?", float("nan"))},
        {"conversations": asked("How many?", {"a": 1})},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}, {"role": "assistant", "content": "4"}]},
        {"messages": [{"role": ["user"], "content": "?"}, {"role": "assistant", "content": "4"}]},
        {"messages": 7},
        {"messages": {"role": "user"}},
        good | {"image": {"path": 7}},
        good | {"images": [[["a.png"]]]},
        good | {"image": "a\0b.png"},
        good | {"video": {"bytes": 3}},
        [good],
        "good",
        7,
        None,
    ]
    write_lines(tmp_path / "rows.jsonl", [*bad, good])
    data = InstructionDataset(tmp_path / "rows.jsonl")
    example = data[0]
    assert example["row"] == str(len(bad))
    assert [entry["scene"] for entry in example["skipped"]] == [str(n) for n in range(len(bad))]
    assert all(entry["reason"] for entry in example["skipped"])
    assert len(data.lengths) == len(bad) + 1 and len(list(StreamedInstructions(tmp_path / "rows.jsonl"))) == 1


def test_paths_do_not_leave_the_folder_of_media(tmp_path):
    write_picture(tmp_path / "media/a.png", 100)
    write_picture(tmp_path / "media/sub/b.png", 50)
    write_picture(tmp_path / "secret.png", 200)
    for kind, path in (
        ("image", "../secret.png"),
        ("image", "sub/../../secret.png"),
        ("image", str(tmp_path / "secret.png")),
        ("video", ".."),
        ("image", {"path": "../secret.png"}),
    ):
        inner = str(tmp_path / "media/sub/../a.png")
        rows = [{"conversations": asked("<image>What?"), kind: path}]
        rows += [{"conversations": asked("<image>What?"), "image": inner}]
        write_lines(tmp_path / "rows.jsonl", rows)
        example = InstructionDataset(tmp_path / "rows.jsonl", tmp_path / "media")[0]
        assert "leads out of `media_root`" in example["skipped"][0]["reason"] and shades(example) == [100]
    # Without `media_root` the annotations say where their media lie.
    write_lines(tmp_path / "media/rows.jsonl", [{"conversations": asked("What?"), "image": "../secret.png"}])
    assert shades(InstructionDataset(tmp_path / "media/rows.jsonl")[0]) == [200]


def test_streamed_rows_are_the_same(tmp_path):
    file = broken(tmp_path)
    data, streamed = InstructionDataset(file), list(StreamedInstructions(file))
    assert [shown(example) for example in streamed] == [shown(data[index]) for index in (3, 4, 5)]
    assert [len(example["skipped"]) for example in streamed] == [3, 0, 0]
    mixed = StreamedInstructions(file, shuffle_buffer=10, seed=1)
    orders = []
    for epoch in (0, 1, 0):
        mixed.set_epoch(epoch)
        orders.append([shown(example)[1] for example in mixed])
    assert orders[0] == orders[2] and sorted(orders[0]) == sorted(orders[1]) == ["0?", "1?", "2?"]


def test_a_stream_tells_of_what_is_broken_at_its_end(tmp_path):
    file = broken(tmp_path)
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[3:] + lines[:3]))
    assert [len(example["skipped"]) for example in StreamedInstructions(file)] == [0, 0, 3]
    file.write_text("\n".join(lines[:3]))
    with pytest.raises(ValueError, match=r"3 rows of 'broken' one after the other can't be used.*missing.png"):
        list(StreamedInstructions(file))


def test_a_stream_is_shared_among_workers(tmp_path):
    (tmp_path / "hub/data").mkdir(parents=True)
    for part in range(3):
        rows = [{"conversations": asked(f"{part}{row}?")} for row in range(4)]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"hub/data/train-0000{part}-of-00003.parquet")
    loader = DataLoader(StreamedInstructions(tmp_path / "hub"), batch_size=None, num_workers=2)
    found = sorted(shown(example)[0] for example in loader)
    assert found == [f"{part}{row}?" for part in range(3) for row in range(4)]


def test_nothing_that_can_be_used(tmp_path):
    row = {"conversations": asked("<image>\nHow many?"), "image": "missing.png"}
    data = InstructionDataset(write_lines(tmp_path / "a.jsonl", [row, row]))
    with pytest.raises(ValueError, match=r"None of the 2 rows from row 0 of 'a' can be used.*missing.png.*media_root"):
        data[0]
    with pytest.raises(IndexError, match="below 2"):
        data[2]


def test_annotations_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*gone.jsonl"):
        InstructionDataset(tmp_path / "gone.jsonl")
    (tmp_path / "none.json").write_text("[]")
    with pytest.raises(ValueError, match="at least one row, got none in none"):
        InstructionDataset(tmp_path / "none.json")
    file = write_lines(tmp_path / "a.jsonl", [{"conversations": asked("How many?")}])
    for fields, words in (
        ({"frames": (8, 4)}, "fewest and the most frames"),
        ({"seconds_per_frame": 0}, "above 0"),
        ({"num_frames": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            InstructionDataset(file, **fields)
    with pytest.raises(ValueError, match="StreamedInstructions"):
        InstructionDataset(datasets.Dataset.from_dict({"messages": [[]]}).to_iterable_dataset())


def test_a_json_array_is_read_piece_by_piece(tmp_path, monkeypatch):
    rows = [{"a": '[]{},\\" ' * index, "b": {"c": [1, index]}} for index in range(20)]
    (tmp_path / "a.json").write_text("\n [" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    monkeypatch.setattr("spa3r.data.instructions._CHUNK", 7)
    assert [json.loads(row["json"]) for row in _json_rows(str(tmp_path / "a.json"))] == rows
    (tmp_path / "cut.json").write_text('[{"a": 1}, {"b"')
    with pytest.raises(ValueError, match=r"cut.json is no JSON"):
        list(_json_rows(str(tmp_path / "cut.json")))


def test_a_file_that_changed_is_read_again(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [{"conversations": asked("One?")}])
    assert shown(InstructionDataset(file)[0])[0] == "One?"
    write_lines(file, [{"conversations": asked("Two?")}, {"conversations": asked("Three?")}])
    assert shown(InstructionDataset(file)[0])[0] == "Two?"


def test_annotations_stay_on_disk(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [{"conversations": asked(f"{i}?" * 50)} for i in range(5000)])
    data = InstructionDataset(file)
    assert data.rows.cache_files
    assert len(pickle.dumps(data)) < 20_000  # what a worker process is given
    assert shown(pickle.loads(pickle.dumps(data))[4999])[0].startswith("4999?")


def test_lengths_are_alike_to_those_of_tokens(tmp_path):
    write_picture(tmp_path / "a.png", 9)
    rows = [
        {"conversations": asked("One two three?")},
        {"conversations": asked("word " * 100)},
        {"conversations": asked("<image>\nHow many?"), "image": "a.png"},
        {"conversations": asked("<image>\nHow many?"), "video": "a.mp4"},
    ]
    file = write_lines(tmp_path / "a.jsonl", rows)
    lengths = InstructionDataset(file).lengths
    assert lengths.dtype == np.int32 and list(np.argsort(lengths)) == [0, 1, 2, 3]
    longer = InstructionDataset(file, num_frames=32).lengths
    assert list(longer[:3]) == list(lengths[:3]) and longer[3] > 3.9 * lengths[3]  # 32 pictures, not 8


def texts(tmp_path, name: str, count: int):
    return InstructionDataset(
        write_lines(tmp_path / f"{name}.jsonl", [{"conversations": asked(f"{name}{i}")} for i in range(count)])
    )


def test_mixture(tmp_path):
    a, b = texts(tmp_path, "a", 5), texts(tmp_path, "b", 50)
    mixture = InstructionMixture({"a": a, "b": b}, {"a": 3, "b": 1}, num_rows=400, seed=2)
    names = [shown(mixture[index])[0] for index in range(400)]
    assert 260 < sum(name.startswith("a") for name in names) < 340
    again = InstructionMixture({"a": a, "b": b}, {"a": 3, "b": 1}, num_rows=400, seed=2)
    assert names[::-1] == [shown(again[index])[0] for index in reversed(range(400))]
    assert names != [shown(row)[0] for row in InstructionMixture({"a": a, "b": b}, {"a": 3, "b": 1}, 400, seed=3)]
    of_a = [name for name in names if name.startswith("a")]
    for first in range(0, 200, 5):  # each row once before any comes again
        assert len(set(of_a[first : first + 5])) == 5
    assert len(mixture.lengths) == 400
    by_size = InstructionMixture({"a": a, "b": b})
    assert len(by_size) == 55 and len({shown(row)[0] for row in by_size}) > 40
    with pytest.raises(ValueError, match="at least one data set"):
        InstructionMixture({})
    with pytest.raises(ValueError, match="`weights` must give each of a, b"):
        InstructionMixture({"a": a, "b": b}, {"a": 1})


def test_made_of_a_configuration(tmp_path):
    texts(tmp_path, "a", 3), texts(tmp_path, "b", 3)
    one = {"annotations": str(tmp_path / "a.jsonl")}
    assert isinstance(make_instructions(one), InstructionDataset)
    assert isinstance(make_instructions(one | {"streaming": True}), StreamedInstructions)
    rooms = make_instructions({"type": "room_questions", "first_seed": 3, "num_rooms": 2})
    assert isinstance(rooms, RoomQuestions) and len(rooms) == 20
    two = {"a": one | {"weight": 1}, "b": {"annotations": str(tmp_path / "b.jsonl"), "weight": 0}}
    mixture = make_instructions({"mixture": two, "num_rows": 9})
    assert {example["source"] for example in mixture} == {"a"} and len(mixture) == 9
    for spec, words in (
        ({"annotation": "a.jsonl"}, "no field 'annotation'. It has: type, streaming, annotations"),
        ({}, "needs 'annotations'"),
        ({"type": "vsi"}, "must be instructions or room_questions, got 'vsi'"),
        ({"mixture": {"a": one | {"weight": 1}, "b": one}}, "b has none"),
        ({"mixture": {"a": one | {"streaming": True}}}, "a is streamed"),
        ({"mixture": {"a": one}, "rows": 3}, "no field 'rows'. It has: mixture, num_rows, seed"),
    ):
        with pytest.raises(ValueError, match=words):
            make_instructions(spec)


def test_what_a_row_says_of_its_video_is_not_left_out_silently(tmp_path):
    write_walk(tmp_path / "walk.mp4", 3)
    rows = [
        {"messages": [{"role": "user", "content": [video]}, {"role": "assistant", "content": "4"}]}
        for video in (
            {"type": "video", "video": "walk.mp4", "nframes": 2},
            {"type": "video", "video": "walk.mp4", "video_start": 1.0, "fps": 2},
            {"type": "video", "video": "walk.mp4", "fps": None},
        )
    ]
    write_lines(tmp_path / "rows.jsonl", rows)
    example = InstructionDataset(tmp_path / "rows.jsonl")[0]
    assert example["row"] == "2"
    for entry, words in zip(example["skipped"], ("nframes", "fps, video_start"), strict=True):
        assert sorted(words.split(", ")) == sorted(
            entry["reason"].split("a video's ")[1].split(" can't")[0].split(", ")
        )
