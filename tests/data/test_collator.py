"""Batches for training: labels on the answers only, pictures never cut, every mixture of rows."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from media import counting_frames, noise, write_video
from tiny import alive, spa3r_config, vggt_config
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from vlm_families import FAMILIES, build, build_config, build_processor

from spa3r import Spa3RImageProcessor, Spa3RModel, Spa3VLMForConditionalGeneration, Spa3VLMProcessor
from spa3r.data import Spa3VLMCollator

# Two processors of transformers still use an old protocol of NumPy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CHATS = [name for name, family in FAMILIES.items() if family.chats]
GENERATION = re.compile(r"\{%-\s*(end)?generation\s*-%\}")
VIEW_KEYS = {"view_pixel_values", "view_grid_hw", "views_per_scene", "image_tokens_per_scene"}
SIZE, IGNORED = 42, -100


def make(name: str = "qwen2_5_vl", marked: bool = True, template: str | None = None) -> Spa3VLMProcessor:
    """A family's processor; its chat template marks the assistant's words, or doesn't, or is another."""
    vlm = build_processor(name)
    token = build_config(name, vlm).image_token_id
    processor = Spa3VLMProcessor(vlm, Spa3RImageProcessor(size=SIZE), image_token_id=token)
    if template is not None:
        processor.chat_template = template
    elif not marked:
        processor.chat_template = GENERATION.sub("", processor.chat_template)
        assert "generation" not in processor.chat_template.replace("add_generation_prompt", "")
    return processor


def say(role: str, *parts) -> dict:
    """A message of words and pictures."""
    kinds = [("text" if isinstance(part, str) else "image", part) for part in parts]
    return {"role": role, "content": [{"type": kind, kind: part} for kind, part in kinds]}


TURNS = [
    say("user", noise(60, 40, 0), noise(33, 90, 1), "How many chairs are there?"),
    say("assistant", "There are three chairs."),
    say("user", "And here? ", noise(28, 28, 2)),
    say("assistant", "(B) two,\nbehind the sofa"),
]
ONE = [say("system", "Be brief."), say("user", noise(120, 50, 3), "Which is closer?"), say("assistant", "The lamp.")]
TEXT = [say("user", "What is two plus two?"), {"role": "assistant", "content": "Four"}]
ROWS = [
    {"messages": TURNS, "source": "vsi", "row": "vsi:7", "question_type": "counting", "skipped": []},
    {"messages": ONE},
    {"messages": TEXT, "source": "chat", "row": "chat:1", "question_type": None, "skipped": []},
]


def learned(processor, labels: torch.Tensor) -> list[str]:
    """The runs of labels, each as text."""
    ids, runs = labels.tolist(), []
    for before, label in zip([IGNORED, *ids], ids):
        if label != IGNORED:
            runs = [*runs, []] if before == IGNORED else runs
            runs[-1].append(label)
    return [processor.decode(run) for run in runs]


def assert_same(ours: dict, reference: dict) -> None:
    assert ours.keys() == reference.keys()
    for key, value in reference.items():
        assert torch.equal(ours[key], value) if isinstance(value, torch.Tensor) else ours[key] == value, key


# Labels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("marked", [True, False])
def test_labels_are_a_mask_made_by_hand(marked):
    processor = make(marked=marked)
    pieces = [  # text, whether it is learned; an image token for each 28 x 28 pixels of the views
        ("<|im_start|>user\n<|vision_start|>", False),
        ("<|image_pad|>", False),
        ("<|vision_end|>How many?<|im_end|>\n<|im_start|>assistant\n", False),
        ("Three chairs.<|im_end|>", True),
        ("\n<|im_start|>user\nWhich?<|im_end|>\n<|im_start|>assistant\n", False),
        ("The red ones<|im_end|>", True),
        ("\n", False),
    ]
    ids, labels = [], []
    for text, is_learned in pieces:
        tokens = processor.tokenizer(text, add_special_tokens=False).input_ids
        ids += tokens
        labels += tokens if is_learned else [IGNORED] * len(tokens)
    messages = [
        say("user", noise(42, 42), "How many?"),
        say("assistant", "Three chairs."),
        say("user", "Which?"),
        say("assistant", "The red ones"),
    ]
    batch = Spa3VLMCollator(processor)([{"messages": messages}])
    assert batch["input_ids"].tolist() == [ids]
    assert batch["labels"].tolist() == [labels]
    assert batch["attention_mask"].tolist() == [[1] * len(ids)]
    assert (batch["skipped"], batch["num_rows"]) == ([], 1)


@pytest.mark.parametrize("name", CHATS)
def test_labels_are_the_assistants_words_and_the_end_token(name):
    family = FAMILIES[name]
    end = family.turns["assistant"][1].strip() or family.tokens["eos_token"]
    batches = []
    for marked in (True, False):
        processor = make(name, marked)
        batches.append(Spa3VLMCollator(processor)(ROWS))
        answers = [
            ["There are three chairs." + end, "(B) two,\nbehind the sofa" + end],
            ["The lamp." + end],
            ["Four" + end],
        ]
        assert [learned(processor, labels) for labels in batches[-1]["labels"]] == answers
    assert_same(*batches)
    batch = batches[0]
    assert_same(Spa3VLMCollator(processor)([ROWS[i] for i in (2, 0, 1)]), batch)  # pictures first
    is_learned = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][is_learned], batch["input_ids"][is_learned])
    # Padded on the right.
    lengths = batch["attention_mask"].sum(1)
    assert torch.equal(batch["attention_mask"].bool(), torch.arange(max(lengths)) < lengths[:, None])
    assert len(set(lengths.tolist())) == 3


@pytest.mark.parametrize("name", CHATS)
def test_inputs_are_the_processors(name):
    """Apart from an end token that a template doesn't write."""
    processor = make(name)
    batch = Spa3VLMCollator(processor)(ROWS)
    reference = processor.apply_chat_template(
        [row["messages"] for row in ROWS],
        tokenize=True,
        return_dict=True,
        processor_kwargs={"padding": True, "padding_side": "right"},
    )
    assert batch.keys() - reference.keys() == {"labels", "skipped", "num_rows"}
    for key, value in reference.items():
        if torch.is_tensor(value) and value.shape == reference["input_ids"].shape and name == "glm4v":
            lengths = reference["attention_mask"].sum(1).tolist()
            assert all(torch.equal(ours[:n], row[:n]) for ours, row, n in zip(batch[key], value, lengths)), key
            assert batch["attention_mask"].sum(1).tolist() == [n + 1 for n in lengths]
        else:
            assert torch.equal(torch.as_tensor(batch[key]), torch.as_tensor(value)), key


OPEN = "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\n' }}"
WORDS = "{%- for item in message['content'] if item['type'] == 'text' -%}{{ item['text'] }}{%- endfor -%}"
CLOSE = "{{ '<|im_end|>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
THOUGHTS = "<think>\n\n</think>\n\n"
SYSTEM = "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}"
TEMPLATES = {
    "a default system prompt": "{%- if messages[0]['role'] != 'system' -%}"
    + SYSTEM
    + "{%- endif -%}"
    + OPEN
    + WORDS
    + CLOSE,
    "words without the space around them": OPEN + WORDS.replace("item['text']", "item['text'] | trim") + CLOSE,
    "thoughts that the prompt has already": OPEN
    + "{%- if message['role'] == 'assistant' -%}{{ '"
    + THOUGHTS
    + "' }}{%- endif -%}"
    + WORDS
    + CLOSE.replace("assistant\n", "assistant\n" + THOUGHTS),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_other_templates_by_difference(kind):
    processor = make(template=TEMPLATES[kind])
    messages = [say("user", "Hi"), say("assistant", " Two chairs"), say("user", "So?"), say("assistant", "Yes.")]
    batch = Spa3VLMCollator(processor)([{"messages": messages}])
    first = "Two chairs" if "space" in kind else " Two chairs"
    assert learned(processor, batch["labels"][0]) == [first + "<|im_end|>", "Yes.<|im_end|>"]
    prompt = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert torch.equal(batch["input_ids"], prompt["input_ids"])


def test_a_template_that_writes_an_answer_in_two_ways_is_refused():
    thought = "{%- if message['role'] == 'assistant' and loop.last -%}{{ '<think></think>' }}{%- endif -%}"
    collator = Spa3VLMCollator(make(template=OPEN + thought + WORDS + CLOSE))
    assert learned(collator.processor, collator([{"messages": TEXT}])["labels"][0]) == ["<think></think>Four<|im_end|>"]
    words = (
        r"writes message 1, the assistant's, in two ways.* the text up to it continues with '<think></think>Four"
        r"<\|im_end\|>\\n', what stands there when messages follow with 'Four<\|im_end\|>.*Mark the words in the "
        r"template, \{% generation %\}"
    )
    with pytest.raises(ValueError, match=words):
        collator([{"messages": [*TEXT, *TEXT]}])
    collator = Spa3VLMCollator(make(template=OPEN + WORDS + CLOSE.replace("assistant\n", "assistant\n<think>")))
    words = r"the prompt for it continues with '<think>', what stands there with the answer with 'Four"
    with pytest.raises(ValueError, match=words):
        collator([{"messages": TEXT}])


def test_a_template_that_leaves_words_out_is_refused():
    collator = Spa3VLMCollator(make(template=OPEN + WORDS.replace("item['text']", "item['text'][:7]") + CLOSE))
    words = r"must write the words of message 1.* to their end, 'Therearethreechairs', got 'There a<"
    with pytest.raises(ValueError, match=words):
        collator([{"messages": [say("user", "Hi"), say("assistant", "There are three chairs")]}])


# Rows of every kind ---------------------------------------------------------------------------------------------------


def test_plain_chat_data_with_files(tmp_path):
    """Contents that are strings, pictures and videos as files, and the empty fields of tables."""
    noise(60, 40, 0).save(tmp_path / "picture.png")
    write_video(tmp_path / "video.mp4", counting_frames(8), fps=2)
    picture = {"type": "image", "image": str(tmp_path / "picture.png"), "video": None, "text": None}
    video = {"type": "video", "video": str(tmp_path / "video.mp4"), "image": None}
    question = {"type": "text", "text": "What?", "image": None}
    answer = {"role": "assistant", "content": "A room", "tool_calls": None}
    rows = [{"messages": [{"role": "user", "content": [media, question]}, answer]} for media in (picture, video)]
    processor = make()
    batch = Spa3VLMCollator(processor)(rows)
    assert batch["views_per_scene"].tolist() == [1, 4]
    assert [learned(processor, labels) for labels in batch["labels"]] == [["A room<|im_end|>"]] * 2
    picture["image"] = str(tmp_path / "missing.png")
    batch = Spa3VLMCollator(processor)(rows)
    assert batch["views_per_scene"].tolist() == [4]
    assert [entry["reason"] for entry in batch["skipped"]] == [
        f"The picture {tmp_path / 'missing.png'} doesn't exist. Check the path."
    ]


def test_skipped_rows_of_the_data_are_passed_on():
    broken = {"source": "vsi", "scene": "vsi:3", "picture": "a.mp4", "reason": "moov atom not found"}
    batch = Spa3VLMCollator(make())([ROWS[0] | {"skipped": [broken]}, ROWS[1]])
    assert (batch["skipped"], batch["num_rows"]) == ([broken], 3)
    assert batch["input_ids"].shape[0] == 2


BAD = {
    "a picture below one patch": ([say("user", noise(13, 50), "What?"), say("assistant", "A")], "14 x 14 pixels"),
    "a very narrow picture": ([say("user", noise(3000, 14), "What?"), say("assistant", "A")], "aspect ratio"),
    "a placeholder in the question": (
        [say("user", noise(60, 40), "What is <|image_pad|>?"), say("assistant", "A")],
        r"message 0 \('user'\) must not contain '<\|image_pad\|>'",
    ),
    "a placeholder of videos": ([say("user", "A <|video_pad|>"), say("assistant", "A")], r"'<\|video_pad\|>'"),
    "a placeholder in the answer": (
        [say("user", "Hi"), say("assistant", "<|image_pad|>")],
        r"\('assistant'\) must not",
    ),
    "the end token in the answer": ([say("user", "Hi"), say("assistant", "A<|im_end|>\nB")], r"'<\|im_end\|>'"),
    "a token in two parts": ([say("user", "<|image", noise(60, 40), "_pad|>"), say("assistant", "A")], "image_pad"),
    "no list": ("How many?", "must be a list of messages"),
    "no dictionaries": (["How many?", "Two"], "Message 0 must be"),
    "no role": ([{"content": "Hi"}, say("assistant", "A")], "must have a role"),
    "no content": ([{"role": "user"}, say("assistant", "A")], "must be a text or a list of items, got None"),
    "a dictionary": (
        [{"role": "user", "content": {"type": "text"}}, say("assistant", "A")],
        "into a list",
    ),
    "a text in a list": ([{"role": "user", "content": ["Hi"]}, say("assistant", "A")], "got the text 'Hi'"),
    "an item without a picture": (
        [{"role": "user", "content": [{"type": "image"}]}, say("assistant", "A")],
        "must hold",
    ),
    "an unknown item": ([{"role": "user", "content": [{"type": "audio"}]}, say("assistant", "A")], "got 'audio'"),
}


@pytest.mark.parametrize("others", [0, 2])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_left_out_and_named(kind, others):
    processor, (messages, words) = make(), BAD[kind]
    processor.image_mode = "native" if "narrow" in kind else "aligned"  # what Qwen's own processor refuses
    bad = {"messages": messages, "source": "vsi", "row": "vsi:9"}
    batch = Spa3VLMCollator(processor)([*ROWS[:others], bad])
    (entry,) = batch["skipped"]
    assert (entry["source"], entry["scene"], batch["num_rows"]) == ("vsi", "vsi:9", others + 1)
    assert re.search(words, entry["reason"]), entry["reason"]
    if others:
        clean = Spa3VLMCollator(processor)(ROWS[:others])
        assert_same(batch | {"skipped": [], "num_rows": others}, clean)
    else:
        assert (batch["labels"] == IGNORED).all()


def test_what_a_chat_template_refuses_is_left_out():
    """Templates raise errors of Jinja's, which aren't ValueErrors."""
    alternate = "{%- for m in messages -%}{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    alternate += "{{ raise_exception('Roles must alternate') }}{%- endif -%}{%- endfor -%}"
    processor = make(template=alternate + OPEN + WORDS + CLOSE)
    batch = Spa3VLMCollator(processor)([{"messages": [*TEXT[:1], *TEXT]}, {"messages": TEXT}])
    assert [entry["reason"] for entry in batch["skipped"]] == ["TemplateError: Roles must alternate"]
    assert learned(processor, batch["labels"][0]) == ["Four<|im_end|>"]


def test_examples_whose_columns_were_removed_are_refused(composed, tmp_path):
    model, processor = composed
    arguments = TrainingArguments(tmp_path, max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model, arguments, train_dataset=ROWS, data_collator=Spa3VLMCollator(processor))
    with pytest.raises(ValueError, match=r"must have `messages`, got the keys \[\].* `remove_unused_columns=False`"):
        trainer.train()


# Length ---------------------------------------------------------------------------------------------------------------

LONG = [say("user", noise(60, 40, 0), "How many?"), say("assistant", " ".join(map(str, range(60))))]
LATE = [
    say("user", "How many?"),
    say("assistant", "Two."),
    say("user", noise(42, 42), "And?"),
    say("assistant", "One."),
]


def per_token(batch: dict) -> set[str]:
    shape = batch["input_ids"].shape
    return {key for key, value in batch.items() if torch.is_tensor(value) and value.shape == shape}


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "internvl"])
def test_long_rows_are_cut_in_their_answers(name):
    processor = make(name)
    whole = Spa3VLMCollator(processor)([{"messages": LONG}, {"messages": TEXT}])
    limit = int(whole["attention_mask"][1].sum()) + 20
    assert limit < whole["input_ids"].shape[1]
    batch = Spa3VLMCollator(processor, max_length=limit)([{"messages": LONG}, {"messages": TEXT}])
    assert (batch["skipped"], batch["num_rows"]) == ([], 2)
    names = {"input_ids", "attention_mask", "labels"}
    names |= {"qwen2_5_vl": {"mm_token_type_ids"}, "gemma3": {"token_type_ids"}, "internvl": set()}[name]
    assert per_token(batch) == per_token(whole) == names
    for key, value in whole.items():
        if key in names:
            assert torch.equal(batch[key], value[:, :limit]), key
        elif torch.is_tensor(value):
            assert torch.equal(batch[key], value), key
    assert learned(processor, batch["labels"][0])[0].startswith("0 1 2 3")


def test_no_picture_is_cut():
    """At every limit a row is there with all of its pictures or not at all."""
    processor, seen = make(), set()
    rows = [{"messages": TURNS, "source": "vsi", "row": "vsi:7"}, {"messages": LATE, "source": "late", "row": "1"}]
    whole = Spa3VLMCollator(processor)(rows)
    is_picture = whole["input_ids"] == processor.image_token_id
    ends = [int(row.nonzero()[-1]) + 2 for row in is_picture]  # with what closes it
    for limit in range(1, whole["input_ids"].shape[1] + 1, 3):
        batch = Spa3VLMCollator(processor, max_length=limit)(rows)
        kept = [row for row, end in enumerate(ends) if end <= limit]
        seen.add(len(kept))
        assert len(batch["input_ids"]) == max(1, len(kept))
        assert [entry["scene"] for entry in batch["skipped"]] == [rows[i]["row"] for i in (0, 1) if i not in kept]
        assert batch["num_rows"] == 2 and batch["input_ids"].shape[1] <= max(limit, 30)
        if kept:
            counts = is_picture.sum(1)[kept].tolist()
            assert batch["image_tokens_per_scene"].tolist() == counts
            assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == counts
            assert batch["views_per_scene"].tolist() == [(3, 1)[i] for i in kept]
            assert (batch["labels"] != IGNORED).any(1).all()
    assert seen == {0, 1, 2}


def test_rows_that_are_left_out_say_why():
    processor = make()
    rows = [
        {"messages": ONE, "source": "spar", "row": "spar:1"},
        {"messages": [say("user", "word " * 50), say("assistant", "Yes")], "source": "chat", "row": "chat:2"},
        {"messages": [say("user", "Hi")]},
    ]
    batch = Spa3VLMCollator(processor, max_length=10)(rows)
    reasons = [entry["reason"] for entry in batch["skipped"]]
    assert re.fullmatch(r"its pictures end at token \d+ of \d+, beyond `max_length` = 10", reasons[0])
    assert re.fullmatch(r"its answer begins at token \d+ of \d+, beyond `max_length` = 10", reasons[1])
    assert reasons[2] == "it has no words of an assistant"
    keys = ("source", "scene", "picture")
    assert [tuple(entry[key] for key in keys) for entry in batch["skipped"]] == [
        ("spar", "spar:1", ""),
        ("chat", "chat:2", ""),
        ("", "", ""),
    ]
    # Every process has a batch all the same.
    assert batch["num_rows"] == 3
    assert batch["views_per_scene"].tolist() == batch["image_tokens_per_scene"].tolist() == [0]
    assert batch["input_ids"].shape[0] == 1 and (batch["labels"] == IGNORED).all()
    assert "pixel_values" not in batch and batch["view_pixel_values"].shape[0] == 0


def test_lengths_are_rounded_up():
    collator = Spa3VLMCollator(make(), pad_to_multiple_of=16)
    batch, plain = collator(ROWS), replace(collator, pad_to_multiple_of=None)(ROWS)
    length = plain["input_ids"].shape[1]
    assert length % 16 and batch["input_ids"].shape[1] == length + -length % 16
    for key in per_token(plain):
        assert torch.equal(batch[key][:, :length], plain[key])
    assert (batch["labels"][:, length:] == IGNORED).all() and not batch["attention_mask"][:, length:].any()
    assert (batch["input_ids"][:, length:] == collator.processor.tokenizer.pad_token_id).all()
    assert replace(collator, max_length=length - 5)(ROWS)["input_ids"].shape[1] % 16 == 0


def test_wrong_arguments_are_named():
    processor = make()
    with pytest.raises(ValueError, match=r"`max_length` must be a number of at least 1, got 0"):
        Spa3VLMCollator(processor, max_length=0)
    with pytest.raises(ValueError, match=r"`pad_to_multiple_of` must be a number of at least 1, got -8"):
        Spa3VLMCollator(processor, pad_to_multiple_of=-8)
    processor.image_token_id = None
    with pytest.raises(ValueError, match=r"`processor.image_token_id` must be known for `max_length`.* got None"):
        Spa3VLMCollator(processor, max_length=5)
    processor.chat_template = None
    with pytest.raises(ValueError, match=r"`processor` must have one chat template, got None"):
        Spa3VLMCollator(processor)
    with pytest.raises(ValueError, match=r"must take conversations, got PaliGemmaProcessor"):
        Spa3VLMCollator(make("paligemma"))([{"messages": ONE[1:]}])


class CountingViews(Spa3RImageProcessor):
    """Counts the pictures that it processes."""

    count = 0

    def process_view(self, *args, **kwargs):
        type(self).count += 1
        return super().process_view(*args, **kwargs)


@pytest.mark.parametrize("marked", [True, False])
def test_pictures_are_processed_once(marked):
    processor = make(marked=marked)
    processor.view_image_processor = CountingViews(size=SIZE)
    CountingViews.count = 0
    Spa3VLMCollator(processor, max_length=500)(ROWS)
    assert CountingViews.count == 4


# Training -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def composed():
    vlm, vlm_processor = build("qwen2_5_vl")
    spa3r = alive(Spa3RModel(spa3r_config(backbone_config=vggt_config(patch_size=14, image_size=70))))
    model = Spa3VLMForConditionalGeneration.from_vlm_and_spa3r(vlm, spa3r)
    alive(model.adapter)
    views = Spa3RImageProcessor(size=SIZE)
    return model, Spa3VLMProcessor(vlm_processor, views, image_token_id=vlm.config.image_token_id)


@torch.no_grad()
def test_the_loss_of_a_batch_is_that_of_its_rows(composed):
    """Weighted by their labels, so padding and neighbours change nothing."""
    model, processor = composed
    collator = Spa3VLMCollator(processor)
    together = model(**collator(ROWS)).loss
    alone = [collator([row]) for row in ROWS]
    weights = torch.tensor([float((batch["labels"] != IGNORED).sum()) for batch in alone])
    losses = torch.stack([model(**batch).loss for batch in alone])
    assert abs(together - (losses * weights).sum() / weights.sum()) < 1e-5


def test_a_plain_trainer_trains_on_batches_of_like_length(composed, tmp_path):
    model, processor = composed

    class Rows(torch.utils.data.Dataset):
        """Rows with the lengths that they have."""

        lengths = np.array([160, 40, 20] * 64)

        def __len__(self):
            return len(self.lengths)

        def __getitem__(self, index):
            return ROWS[index % 3]

    class GroupingTrainer(Trainer):
        def _get_train_sampler(self, dataset=None):
            return LengthGroupedSampler(self.args.train_batch_size, lengths=self.train_dataset.lengths)

    arguments = TrainingArguments(
        tmp_path,
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=1e-2,
        remove_unused_columns=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = GroupingTrainer(
        model, arguments, train_dataset=Rows(), data_collator=Spa3VLMCollator(processor, max_length=400)
    )
    batches = [[index % 3 for index in batch] for batch in trainer.get_train_dataloader().batch_sampler]
    assert sum(map(len, batches)) == 192
    assert sum(len(set(batch)) == 1 for batch in batches) > 0.7 * len(batches)  # at random one of 27
    before = model.adapter.gate.weight.clone()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(0 < loss < 20 for loss in losses)
    assert not torch.equal(model.adapter.gate.weight, before)
