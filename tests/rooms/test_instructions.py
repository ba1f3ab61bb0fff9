"""Questions about rooms as instruction data, and as files in the released layouts."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
from datasets import load_dataset

from spa3r.data.instructions import InstructionDataset
from spa3r.media.videos import count_frames, default_num_frames, sample_frames
from spa3r.rooms import LEVELS, QUESTION_TYPES, camera_walk, generate_room, render
from spa3r.rooms.export import export_rooms
from spa3r.rooms.instructions import FIRST_TEST_SEED, RoomQuestions
from spa3r.vsi_bench.format import make_prompt

ROOMS = 4


def small(first_seed: int = 0, num_rooms: int = ROOMS, **kwargs) -> RoomQuestions:
    """Rooms in pictures of 56 x 56 pixels."""
    return RoomQuestions(first_seed, num_rooms, **({"size": 56} | kwargs))


@pytest.fixture(scope="module")
def questions() -> RoomQuestions:
    return small()


@pytest.fixture(scope="module")
def examples(questions) -> list[dict]:
    return [questions[index] for index in range(len(questions))]


def pictures_of(example: dict) -> list[np.ndarray]:
    return [np.asarray(item["image"]) for item in example["messages"][0]["content"] if item["type"] == "image"]


def same(one: dict, other: dict) -> bool:
    def told(example: dict) -> list:
        content = [item for message in example["messages"] for item in message["content"]]
        return [example["row"], example["question_type"], *(item.get("text") for item in content)]

    pairs = zip(pictures_of(one), pictures_of(other), strict=True)
    return told(one) == told(other) and all(np.array_equal(a, b) for a, b in pairs)


def test_examples_are_conversations_about_pictures(questions, examples):
    assert len(examples) == ROOMS * len(QUESTION_TYPES)
    for index, example in enumerate(examples):
        row = questions.row(index)
        user, assistant = example["messages"]
        assert [user["role"], assistant["role"]] == ["user", "assistant"]
        assert [item["type"] for item in user["content"]] == ["image"] * 8 + ["text"]
        assert user["content"][-1]["text"] == make_prompt(row)
        assert assistant["content"] == [{"type": "text", "text": row["ground_truth"]}]
        assert example["source"] == "rooms" and example["skipped"] == []
        assert example["row"].startswith(f"{row['scene_name']}/{row['question_type']}/")
        assert example["question_type"] == row["question_type"]


def test_types_are_equally_frequent(examples):
    assert Counter(example["question_type"] for example in examples) == dict.fromkeys(QUESTION_TYPES, ROOMS)


def test_room_size_is_asked_once():
    questions = small(num_rooms=2, per_type=3)
    counts = Counter(questions.row(index)["question_type"] for index in range(len(questions)))
    assert counts.pop("room_size_estimation") == 2 and set(counts.values()) == {6}


def test_pictures_are_those_of_the_walk(examples):
    row = next(example for example in examples if example["row"].startswith("0000001/"))
    room = generate_room(1)
    views = render(room, camera_walk(room, 48, (56, 56))[::3])
    for picture, view in zip(pictures_of(row), (0, 2, 4, 6, 8, 10, 12, 15), strict=True):
        np.testing.assert_array_equal(picture, views.images[view])


def test_an_example_depends_on_nothing_but_its_index(examples):
    again = small()
    for index in (25, 3, 39, 14):
        assert same(again[index], examples[index])
    assert same(again[-1], examples[-1])
    assert not same(small(seed=1)[25], examples[25])


def test_rendered_folders_give_the_same_examples(tmp_path, examples):
    for seed in range(ROOMS - 1):  # the last one is rendered
        room = generate_room(seed)
        views = render(room, camera_walk(room, 48, (56, 56))[::3])
        folder = tmp_path / f"{seed:07d}"
        folder.mkdir()
        for view, image in enumerate(views.images):
            PIL.Image.fromarray(image).save(folder / f"{view:03d}.png")
        np.savez(folder / "truth.npz", instance_ids=views.instance_ids.astype(np.uint8))
    read = small(rendered=tmp_path)
    assert all(same(read[index], example) for index, example in enumerate(examples))
    PIL.Image.new("RGB", (56, 56)).save(tmp_path / "0000001" / "000.png")  # they are really read
    index = next(index for index, example in enumerate(examples) if example["row"].startswith("0000001/"))
    assert not same(small(rendered=tmp_path)[index], examples[index])


def test_what_a_room_does_not_allow_stands_in_from_the_next(questions):
    own = {index for index in range(len(questions)) if int(questions.row(index)["scene_name"]) == index // 10}
    assert len(questions) > len(own) > len(questions) // 2, "some rooms of level 0 are too empty for some types"
    level = replace(LEVELS[0], num_objects=(1, 1))
    single = small(num_rooms=1, level=level, types=("room_size_estimation", "route_planning"))
    assert single.row(1) == single.row(0), "no room has a route: what every room has is asked"


def test_no_question_stands_twice_where_rooms_are_full():
    questions = small(num_rooms=3, level=2, per_type=2, types=[t for t in QUESTION_TYPES if t != "object_counting"])
    rows = [questions.row(index) for index in range(len(questions))]
    assert len({(row["scene_name"], row["question"]) for row in rows}) == len(rows)


def test_training_and_test_rooms_never_overlap():
    training, test = small(FIRST_TEST_SEED - 2, 2), small(FIRST_TEST_SEED, 2)
    seeds = [{int(data.row(index)["scene_name"]) for index in range(len(data))} for data in (training, test)]
    assert max(seeds[0]) < FIRST_TEST_SEED <= min(seeds[1]), "rooms that stand in are of the same side, too"
    with pytest.raises(ValueError, match=r"where the rooms to test on begin.*got 999998 \+ 3"):
        small(FIRST_TEST_SEED - 2, 3)


def test_conversations_ask_every_question_of_a_room_once(questions):
    conversations = small(questions_per_example=4)
    assert len(conversations) == 3 * ROOMS and conversations.num_questions == questions.num_questions == len(questions)
    own = {(row["scene_name"], make_prompt(row)): row for row in map(questions.row, range(len(questions)))}
    asked, types = [], set()
    for index in range(len(conversations)):
        example, again = conversations[index], small(questions_per_example=4)[index - len(conversations)]
        assert same(example, again) and example["question_type"] is None
        scene, kind, number = example["row"].split("/")
        assert (int(scene), kind, int(number)) == (index // 3, "conversation", index)
        users, assistants = example["messages"][::2], example["messages"][1::2]
        assert [len(user["content"]) for user in users] == [9] + [1] * (len(users) - 1) and len(users) <= 4
        for user, assistant in zip(users, assistants, strict=True):
            row = own[scene, user["content"][-1]["text"]]
            assert assistant["content"][0]["text"] == row["ground_truth"]
            asked.append((scene, row["question"], row["question_type"]))
            types.add(row["question_type"])
        assert all(np.array_equal(a, b) for a, b in zip(pictures_of(example), questions.pictures(int(scene))))
    assert len(set(asked)) == len(asked) and types == set(QUESTION_TYPES)
    stand_ins = [index for index in range(len(questions)) if int(questions.row(index)["scene_name"]) != index // 10]
    assert len(asked) >= len(questions) - len(stand_ins)


def test_a_conversation_of_stand_ins_alone_asks_for_the_size_of_the_room():
    level = replace(LEVELS[0], num_objects=(1, 1))
    examples = small(level=level, types=["object_rel_distance", "route_planning"], questions_per_example=2)
    assert len(examples) == ROOMS
    assert {len(examples[index]["messages"]) for index in range(ROOMS)} == {2}
    assert "size of this room" in examples[0]["messages"][0]["content"][-1]["text"]


def test_errors_say_what_was_wanted(tmp_path):
    with pytest.raises(ValueError, match=r"`frames` must be a whole number from 1 to 16, got 17"):
        small(frames=17)
    with pytest.raises(ValueError, match="`num_rooms` must be a whole number of at least 1, got 0"):
        small(num_rooms=0)
    with pytest.raises(ValueError, match="`questions_per_example` must be a whole number of at least 1, got 0"):
        small(questions_per_example=0)
    with pytest.raises(IndexError, match="`index` must be below 40, the number of questions, got 40"):
        small(questions_per_example=5).row(40)
    with pytest.raises(FileNotFoundError, match=r"`rendered` must be a folder of rendered rooms, got .*missing"):
        small(rendered=tmp_path / "missing")
    with pytest.raises(ValueError, match=r"types: wanted names out of .* got 'weight'"):
        small(types=("weight",)).row(0)
    with pytest.raises(IndexError, match="`index` must be below 40, the number of examples, got 40"):
        small()[40]


# Released layouts -----------------------------------------------------------------------------------------------------


def test_videos_give_the_pictures_back(tmp_path, questions):
    export_rooms(questions, tmp_path)
    videos = sorted((tmp_path / "rooms").iterdir())
    assert [video.name for video in videos] == [f"{seed:07d}.mp4" for seed in range(ROOMS)]
    assert count_frames(videos[2]) == 8 == default_num_frames(16)
    frames = sample_frames(videos[2])
    for frame, picture in zip(frames, questions.pictures(2), strict=True):
        assert np.abs(np.asarray(frame, float) - np.asarray(picture, float)).mean() < 6


def test_vsi_590k_layout(tmp_path, questions):
    annotations = export_rooms(questions, tmp_path, "vsi_590k")
    rows = [json.loads(line) for line in annotations.read_text().splitlines()]
    assert annotations.name == "rooms.jsonl" and json.loads((tmp_path / "rooms.json").read_text()) == rows
    for index, row in enumerate(rows):
        asked = questions.row(index)
        assert row["conversations"] == [
            {"from": "human", "value": f"<image>\n{make_prompt(asked)}"},
            {"from": "gpt", "value": asked["ground_truth"]},
        ]
        assert row["question_type"] == asked["question_type"]
        assert (tmp_path / row["video"]).is_file() and asked["scene_name"] in row["video"]


def test_vsi_bench_layout(tmp_path, questions):
    table = export_rooms(questions, tmp_path, "vsi_bench")
    rows = [questions.row(index) for index in range(len(questions))]
    cache = str(tmp_path / "cache")
    assert list(load_dataset("parquet", data_files=str(table), split="train", cache_dir=cache)) == rows
    assert [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()] == rows
    assert all((tmp_path / row["dataset"] / f"{row['scene_name']}.mp4").is_file() for row in rows)


def test_exported_questions_are_read_as_instruction_data(tmp_path, questions, examples):
    annotations = export_rooms(questions, tmp_path, "vsi_590k")
    for name in (annotations.name, "rooms.json"):
        read = InstructionDataset(tmp_path / name, media_root=tmp_path)
        assert len(read) == len(examples)
        for index in (0, 17, len(read) - 1):
            example, wanted = read[index], examples[index]
            texts = [
                [item["text"].strip() for message in one["messages"] for item in message["content"] if "text" in item]
                for one in (example, wanted)
            ]
            assert texts[0] == texts[1] and example["skipped"] == []
            assert example["question_type"] == wanted["question_type"]
            for picture, original in zip(pictures_of(example), pictures_of(wanted), strict=True):
                assert np.abs(picture.astype(float) - original).mean() < 6


def test_export_says_what_it_cannot_write(tmp_path):
    with pytest.raises(ValueError, match=re.escape('`layout` must be "vsi_590k" or "vsi_bench", got "vsi"')):
        export_rooms(small(), tmp_path, "vsi")
    with pytest.raises(ValueError, match=r"H.264 stores no odd sides, got pictures of 31 x 31 pixels"):
        export_rooms(small(num_rooms=1, size=31), tmp_path)
