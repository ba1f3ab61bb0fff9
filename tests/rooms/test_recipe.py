"""The steps of examples/rooms from pictures to a Spa3-VLM: a few steps of each, on a few rooms."""

import importlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from spa3r import Spa3RForPreTraining, Spa3VLM, Spa3VLMProcessor
from spa3r.checkpoints import VLM
from spa3r.evaluation import answer
from spa3r.rooms import FURNITURE, RoomWalk, generate_room, look_around
from spa3r.rooms.embedded import embedded_spa3r
from spa3r.rooms.instructions import RoomQuestions

RECIPE = Path(__file__).parents[2] / "examples" / "rooms"
ROOMS = 6

pytestmark = pytest.mark.slow


def run(folder: Path, program: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, RECIPE / program, *arguments], cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    run(folder, "render.py", "data", "--rooms", str(ROOMS))
    run(folder, "conversations.py", "data", "--rooms", str(ROOMS))
    few = "--vision-steps 3 --vision-rooms 4 --vision-batch 4 --place-steps 3 --looking-steps 3 --steps 3 --batch 4"
    run(folder, "train_vlm.py", "data", "run", *few.split(), "--test-rooms", "1", "--threads", "1")
    return folder


def test_conversations_are_about_what_is_there(folder):
    rows = [json.loads(line) for line in (folder / "data" / "conversations.jsonl").open()]
    assert len({row["id"] for row in rows}) == len(rows) >= 3 * ROOMS
    for row in rows:
        assert len(row["images"]) == 8 and all((folder / "data" / name).is_file() for name in row["images"])
        assert row["messages"][0]["content"].startswith("<image>" * 8)
        lines = [message["content"].split("\n") for message in row["messages"][::2]]
        tasks = [line[1][:20] + "which" * ("which of these" in line[1]) for line in lines if len(line) > 1]
        assert len(tasks) == len(set(tasks)), "of every task one at most"
    descriptions = [row for row in rows if any("Which objects does" in m["content"] for m in row["messages"])]
    assert len(descriptions) == ROOMS
    asked = [
        (row["messages"][i]["content"], row["messages"][i + 1]["content"])
        for row in rows
        for i in range(0, 4, 2)
        if i + 1 < len(row["messages"])
    ]
    letters = [answer for question, answer in asked if "\nOptions:\n" in question]
    assert letters and set(letters) <= set("ABCD")
    opened = [answer for question, answer in asked if "is the closest to" in question and "Options" not in question]
    assert opened and all(len(answer) > 2 for answer in opened), "the option itself"


def test_conversations_in_free_wording_are_about_their_room(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPE))
    from conversations import FREE_CONVERSATIONS, FREE_QUESTIONS
    from free_wording import COLOR, COUNT, SQUARE_METERS, plural

    rows = [json.loads(line) for line in (folder / "data" / "conversations.jsonl").open()]
    rows = [row for row in rows if not any("\n" in message["content"] for message in row["messages"])]
    rows = [row for row in rows if "Which objects does each" not in row["messages"][0]["content"]]
    assert len(rows) == ROOMS * FREE_CONVERSATIONS
    checked = 0
    for row in rows:
        room = generate_room(int(row["id"].partition("/")[0]), 0)
        said = [message["content"].replace("<image>", "") for message in row["messages"]]
        assert len(said) == 2 * FREE_QUESTIONS
        counts = {
            template.format(**{"as": plural(kind)}): sum(item.name == kind for item in room.objects)
            for template in COUNT
            for kind in FURNITURE
        }
        colors = {template.format(a=item.name): item.color for template in COLOR for item in room.objects}
        for question, told in zip(said[::2], said[1::2]):
            if question in counts:
                assert int(told) == counts[question]
            elif question in SQUARE_METERS:
                assert told == f"{room.size[0] * room.size[1]:.1f} square meters"
            elif question in colors and sum(f"the {item.name}" in question for item in room.objects) == 1:
                assert told == colors[question]
            else:
                continue
            checked += 1
    assert checked > 2 * ROOMS


def test_tokens_of_free_questions_are_words(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPE))
    from conversations import Conversations

    tokenizer = AutoTokenizer.from_pretrained(folder / "run" / "vlm")
    turns = [turn for turns in Conversations(folder / "data").turns for turn in turns]
    free = [question for question, _ in turns if "\n" not in question and "each picture" not in question]
    others = "\n".join(text for question, told in turns if question not in free for text in (question, told))
    tokens = [[tokenizer.decode(token) for token in tokenizer(question).input_ids] for question in free]
    longer = {text for line in tokens for text in line if " " in text.strip()}
    assert all(text in others for text in longer), "only the benchmark's wording has tokens of several words"
    assert sum(map(len, tokens)) < 1.5 * sum(len(question.split()) for question in free)
    line = "Measuring from the closest point of each object, what is the distance between the "
    assert len(tokenizer(line).input_ids) < len(line.split()) / 2


def test_questions_share_pictures_and_do_not_see_each_other(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPE))
    from conversations import FRAMES, Conversations
    from questions import Questions

    vlm = AutoModelForImageTextToText.from_pretrained(folder / "run" / "vlm", attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "run" / "vlm")
    conversations, seen = Conversations(folder / "data"), load_file(folder / "run" / "seen.safetensors")["made"]
    grids = torch.tensor([[1, 8, 8]] * FRAMES)

    def logits(rooms: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        looked = BaseModelOutputWithPooling(pooler_output=seen[rooms].float().flatten(0, 1).split(16))
        output = vlm(**inputs, image_grid_thw=grids.repeat(len(rooms), 1), mm_encoder_outputs={"image": looked})
        return output.logits.detach()

    rooms, packed = Questions(conversations, vlm, tokenizer, 16).draw(np.random.default_rng(0), 2, 5)
    together, labels = logits(rooms, packed), packed["labels"]
    picture = f"<|vision_start|>{'<|image_pad|>' * 16}<|vision_end|>"
    found = 0
    for row, room in enumerate(rooms):
        for question, truth in conversations.turns[room]:
            turns = [{"role": "user", "content": picture * FRAMES + question}, {"role": "assistant", "content": truth}]
            ids = tokenizer.apply_chat_template(turns, return_dict=True, return_tensors="pt").input_ids
            first = 2 + FRAMES * 18 + 1  # of the question; before it "<|im_start|>user\n" and pictures
            own = ids[0, first:-1]  # a line break follows the answer
            windows = packed["input_ids"][row].unfold(0, len(own), 1)
            for start in (windows == own).all(1).nonzero()[:, 0].tolist():
                alone = logits(
                    rooms[row : row + 1],
                    {"input_ids": ids, "mm_token_type_ids": (ids == tokenizer.image_token_id).int()},
                )[0, first:-1]
                assert torch.allclose(together[row, start : start + len(own)], alone, atol=1e-4)
                told = labels[row, start : start + len(own)]
                assert tokenizer.decode(told[told >= 0]) == f"{truth}<|im_end|>"
                found += 1
    assert found >= 10


@pytest.mark.parametrize(
    ("source", "integration", "width"),
    [
        ("none", "cross_attention", 0),
        ("backbone", "cross_attention", 192),
        ("spa3r", "append", 128),
        ("spa3r", "cross_attention", 128),
    ],
)
def test_every_variant_is_trained_on_what_was_encoded_before(folder, source, integration, width):
    out = f"{source}-{integration}"
    kind = ("--spatial-source", source, "--integration", integration)
    few = ("--align-steps", "3", "--steps", "3", "--batch", "2", "--test-rooms", "1", "--threads", "1")
    run(folder, "train_spa3_vlm.py", "data", "run", out, *kind, *few)
    model = Spa3VLM.from_pretrained(folder / out)
    processor = Spa3VLMProcessor.from_pretrained(folder / out)
    before, after = AutoModelForImageTextToText.from_pretrained(folder / "run" / "vlm"), model.vlm.state_dict()
    for name, tensor in before.state_dict().items():
        learns = any(
            part in name for part in ("layers.2.", "layers.3.", "layers.4.", "layers.5.", "language_model.norm")
        )
        assert torch.equal(tensor, after[name]) is not learns, "what looks is frozen, the rest learns"
    questions = RoomQuestions(0, 1, rendered=folder / "data")
    assert len(answer(model, processor, [questions[0]], max_new_tokens=2)) == 1
    if source == "none":
        return
    frozen = embedded_spa3r()[0].spa3r.state_dict()
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in model.spa3r.state_dict().items())
    # What was encoded before is what the processor's views give.
    encoded = load_file(folder / "run" / f"encoded_by_{source}.safetensors")["made"]
    assert encoded.shape == (ROOMS, 64 if source == "spa3r" else 8 * 64, width)
    views = processor.view_image_processor.pack([questions.pictures(0)])
    layout = views["view_pixel_values"], views["view_grid_hw"], views["views_per_scene"]
    with torch.no_grad():
        own = model.spa3r.encode(*layout)[0] if source == "spa3r" else model.spa3r.backbone_features(*layout)
    assert (encoded[0].float() - own).std() < 0.03 * own.std()  # it was encoded in bfloat16


@pytest.mark.parametrize("source", ["none", "spa3r"])
def test_training_goes_on_from_a_model_of_the_package(folder, source):
    few = ("--steps", "2", "--batch", "2", "--free", "0.6", "--test-rooms", "1", "--threads", "1")
    kind = ("--spatial-source", source, "--start-from", "embedded")
    run(folder, "train_spa3_vlm.py", "data", "run", f"more-{source}", *kind, *few)
    before = Spa3VLM.from_pretrained(VLM if source == "none" else "embedded").state_dict()
    after = Spa3VLM.from_pretrained(folder / f"more-{source}").state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        learns = re.search(r"language_model[.](layers[.][2-5]|norm)", name) is not None
        assert torch.equal(tensor, after[name]) is not learns, name


def test_the_script_for_a_gpu_is_rehearsed_on_the_cpu(tmp_path, printed):
    settings = {"DEVICE": "cpu", "REHEARSE": "1", "FROZEN": "embedded", "PYTHON": sys.executable}
    done = subprocess.run(
        [RECIPE / "gpu.sh", tmp_path / "out"],
        env=os.environ | settings | {"WORK": str(tmp_path / "work")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr
    packed = {file.name for file in (tmp_path / "out").iterdir()}
    models = {"frozen", "spa3r-large-both-0", "arms-0"}
    assert packed == {f"{name}.safetensors" for name in models} | {"logs.json", "log.txt"}
    run(tmp_path, "collect.py", "unpack", "out", "again")
    frozen = embedded_spa3r()[0].spa3r.backbone.state_dict()
    for name, targets in (("spa3r-large-both-0", ("geometry", "semantic")), ("spa3r-small-geometry-0", ("geometry",))):
        model = Spa3RForPreTraining.from_pretrained(tmp_path / "again" / name)
        assert model.config.targets == targets
        backbone = model.spa3r.backbone.state_dict()
        assert all(torch.equal(backbone[key], tensor) for key, tensor in frozen.items())
        trained = load_file(tmp_path / "work" / "run" / name / "model.safetensors")
        state = model.state_dict()
        assert all(torch.equal(state[key], tensor.half().float()) for key, tensor in trained.items())
        rows = [json.loads(line) for line in (tmp_path / "again" / name / "many.jsonl").open()]
        assert rows and all(np.isfinite(row["geometry_cosine"]) for row in rows)
    for size, arm, semantic in (("small", "geometry alone", "not trained"), ("large", "the method", r"-?\d+[.]\d")):
        text = printed("compare_fields", tmp_path / "again", "--size", size, "--rooms", 2, "--known-rooms", 32)
        row, *_ = re.findall(rf"^[|] {arm}.*", text, re.MULTILINE)
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1] == "1" and re.fullmatch("(9|3) to \\1", cells[2]) and re.fullmatch(r"-?\d+[.]\d", cells[3])
        assert re.fullmatch(semantic, cells[4]) and re.fullmatch(r"\d[.]\d{4}", cells[5])
        assert re.fullmatch(semantic, cells[6])
        assert text == printed("compare_fields", tmp_path / "again", "--size", size, "--rooms", 2), "kept results"


@pytest.fixture
def printed(monkeypatch, capsys):
    """What a program of the recipe prints, run in this process."""
    monkeypatch.syspath_prepend(str(RECIPE))

    def run_program(name: str, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        importlib.import_module(name).main()
        return capsys.readouterr().out

    return run_program


def test_objects_are_scored_beside_all_patches(printed):
    """The true features are the upper bound; a small teacher confuses classes, too."""
    text = printed("evaluate", "embedded", "--rooms", 3, "--known-rooms", 32)
    found = re.findall(r"^  objects +(\w+) +([\d.]+) ", text, re.MULTILINE)
    accuracy = {name: float(value) for name, value in found}
    assert 0.4 < accuracy["true_features"] <= 1
    baselines = ("context_mean", "nearest_view", "shuffled_latents", "shuffled_cameras")
    assert all(accuracy[name] < accuracy["true_features"] for name in (*baselines, "model"))
    assert text.count("object accuracy ↑") == 2, "given and predicted cameras"


def test_patches_of_furniture_are_those_of_the_renderer(printed, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPE))
    from common import RenderedRooms
    from field import object_classes, patch_classes
    from render import CLASSES

    rooms = RenderedRooms.render(5, 1)
    room, ids = generate_room(5, 0), rooms.instance_ids[0]
    labels = object_classes(rooms, 0, np.arange(16)).view(16, 8, 8)
    for view, row, column in np.ndindex(16, 8, 8):
        patch = ids[view, 14 * row : 14 * row + 14, 14 * column : 14 * column + 14]
        shares = {item.name: 0.0 for item in room.objects}
        for number, item in enumerate(room.objects, start=1):
            shares[item.name] += (patch == number).mean()
        wanted = [CLASSES.index(name) for name, share in shares.items() if share > 0.5]
        assert labels[view, row, column] == (wanted[0] if wanted else -1)
    shown = patch_classes(rooms, 0, np.arange(16)).view(16, 8, 8)
    assert {"wall", "floor", "ceiling"} <= {CLASSES[index] for index in shown.unique() if index >= 0}
    assert (shown[labels >= 0] == labels[labels >= 0]).all()


def test_more_views_and_unseen_objects_are_measured(printed):
    text = printed("more_views", "embedded", "--rooms", 2, "--known-rooms", 32)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    assert [row[0] for row in rows[1:]] == ["8", "8", "16", "16", "32", "32"]
    assert [row[2] for row in rows[1:]] == [x for n in (8, 16, 32) for x in (f"{64 * n} x 192", "64 x 128")]
    text = printed("unseen_objects", "--rooms", 6)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    assert len(rows) == 7 and "+ VGGT's tokens: not trained" in text
    for row in rows[1:4] + rows[5:]:
        assert all(re.fullmatch(r"\d+[.]\d ± (\d+[.]\d|nan)", cell) for cell in row[1:])


def test_unseen_objects_are_in_no_picture_of_the_vlm(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPE))
    from unseen_objects import PICTURES, questions

    kinds = Counter()
    for seed in range(1_000_000, 1_000_030):
        room = generate_room(seed, 0)
        walk = RoomWalk.from_cameras(room, look_around(room))
        for asked in questions(walk, np.random.default_rng(seed)):
            kinds[asked.kind, asked.truth if asked.kind == "existence" else ""] += 1
            name = re.search(r"Is there a (.+)[?]|How many (.+)[(]s[)]|between the (.+) and the", asked.prompt)
            name = next(filter(None, name.groups()))
            shown = [i for i, item in enumerate(room.objects) if name in (item.name, f"{item.color} {item.name}")]
            assert (walk.shares[:PICTURES, shown] < 0.0004).all()
            assert bool(shown) is (asked.truth != "no")
            assert asked.score(asked.truth) == 1
            if asked.kind == "count":
                assert asked.truth == str(len(shown))
    assert kinds["existence", "yes"] == kinds["existence", "no"] == kinds["count", ""] > 10
    assert kinds["distance", ""] > 10


def test_the_script_uses_programs_and_options_that_exist():
    script = (RECIPE / "run.sh").read_text()
    assert subprocess.run(["bash", "-n", RECIPE / "run.sh"]).returncode == 0
    for program in set(re.findall(r'"\$here/(\w+[.]py)"', script)):
        assert (RECIPE / program).is_file(), program
    for line in script.replace("\\\n", " ").splitlines():
        if program := re.search(r'"\$here/(\w+[.]py)"', line):
            options = re.findall(r"(?<= )--[a-z][a-z0-9-]*", line)
            text = (RECIPE / program[1]).read_text()
            assert all(f'"{option}"' in text for option in options), line
    measured = {"evaluate.py", "compare_fields.py", "more_views.py", "unseen_objects.py", "answers.py", "package.py"}
    assert measured <= set(re.findall(r"\w+[.]py", script))
