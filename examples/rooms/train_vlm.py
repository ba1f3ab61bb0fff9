"""Step 7 of the rooms recipe: a small VLM, shaped like Qwen2.5-VL, learns to see rooms and to answer questions.

It starts from random numbers and learns without Spa3R: first to name what single pictures show, then from conversations
about a walk's pictures, that is what each of them shows, and VSI-Bench's question types with their computed answers. A
conversation asks several questions, so that the pictures are read once for all of them.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from common import FIRST_HELD_OUT, train
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from spa3r import Spa3RImageProcessor, Spa3VLMProcessor
from spa3r.data.collator import Spa3VLMCollator
from spa3r.data.room_questions import RoomQuestions
from spa3r.data.vsi_format import make_prompt
from spa3r.evaluation.room_answers import evaluate_answers, score_table
from spa3r.models.spa3_vlm.modeling_spa3_vlm import VIEW_KEYS

FRAMES = 8

VIEW_SIZE = 112

SPECIAL_TOKENS = {
    "pad_token": "<|endoftext|>",
    "eos_token": "<|im_end|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif item['type'] == 'text' -%}
                {{- item['text'] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

CLEAR = 0.004
"""Share of a picture that an object covers to be named in its description: 50 pixels."""

DESCRIBE = "Which objects does each picture show?"
DESCRIBE_ONE = "Which objects does the picture show?"
QUESTIONS_AT_ONCE = 6


class RoomConversations:
    """Conversations about rooms, a pure function of a room and a generator."""

    def __init__(self, questions: RoomQuestions):
        self.questions = questions
        self.per_room = questions.num_questions // questions.num_rooms

    def seen(self, room: int) -> list[str]:
        """What each picture of a walk shows, by the names that the questions use, in alphabetical order."""
        walk = self.questions.walk(self.questions.first_seed + room)
        return [
            ", ".join(sorted(name for name, share in zip(walk.names, shares) if name and share > CLEAR)) or "none"
            for shares in walk.shares
        ]

    def describe(self, room: int) -> str:
        return " ".join(f"{view}: {names}." for view, names in enumerate(self.seen(room), start=1))

    def draw(self, rng: np.random.Generator) -> dict:
        room = int(rng.integers(self.questions.num_rooms))
        if rng.random() < 0.2:
            turns = [(DESCRIBE, self.describe(room))]
        else:
            slots = rng.choice(self.per_room, QUESTIONS_AT_ONCE, replace=False)
            rows = [self.questions.row(room * self.per_room + int(slot)) for slot in slots]
            # Where a room allows no question of a type, one about another room stands in: not in this conversation.
            rows = [row for row in rows if int(row["scene_name"]) == self.questions.first_seed + room]
            turns = [(make_prompt(row), row["ground_truth"]) for row in rows] or [(DESCRIBE, self.describe(room))]
        return self.conversation(self.questions.pictures(self.questions.first_seed + room), turns)

    def draw_one(self, rng: np.random.Generator) -> dict:
        room, view = int(rng.integers(self.questions.num_rooms)), int(rng.integers(self.questions.frames))
        picture = self.questions.pictures(self.questions.first_seed + room)[view]
        return self.conversation([picture], [(DESCRIBE_ONE, f"{self.seen(room)[view]}.")])

    @staticmethod
    def conversation(pictures: list, turns: list[tuple[str, str]]) -> dict:
        messages = []
        for turn, (question, answer) in enumerate(turns):
            images = [{"type": "image", "image": picture} for picture in pictures] if turn == 0 else []
            messages += [
                {"role": "user", "content": [*images, {"type": "text", "text": question}]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ]
        return {"messages": messages}


def make_processor(questions: RoomQuestions) -> Spa3VLMProcessor:
    """Qwen2.5-VL's processor with a small byte-level BPE that has learnt its merges from questions about rooms."""
    conversations = RoomConversations(questions)
    texts = [
        text for room in range(questions.num_rooms) for text in (DESCRIBE, DESCRIBE_ONE, conversations.describe(room))
    ]
    texts += [make_prompt(questions.row(index)) for index in range(questions.num_questions)]
    bpe = Tokenizer(models.BPE())
    # Digits stand alone, so that numbers are spelled alike wherever they are.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder, bpe.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=768, initial_alphabet=alphabet, show_progress=False))
    standard = {name: token for name, token in SPECIAL_TOKENS.items() if name in ("pad_token", "eos_token")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        **standard,
        extra_special_tokens={name: token for name, token in SPECIAL_TOKENS.items() if name not in standard},
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.add_tokens(["<|im_start|>", "<|vision_start|>", "<|vision_end|>"], special_tokens=True)
    size = {"shortest_edge": 28 * 28, "longest_edge": (2 * VIEW_SIZE) ** 2}  # in pixels, whatever the names say
    vlm_processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=14, merge_size=2, size=size),
        video_processor=Qwen2VLVideoProcessor(patch_size=14, merge_size=2, size=size),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )
    return Spa3VLMProcessor(
        vlm_processor,
        Spa3RImageProcessor(size=VIEW_SIZE),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
    )


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    ids = tokenizer.get_vocab()
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
            "initializer_range": 0.06,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_heads": 4,
            "out_hidden_size": 128,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "fullatt_block_indexes": [0, 1, 2],
            "initializer_range": 0.06,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder of render.py")
    parser.add_argument("output", type=Path, help="folder for the VLM, its log and its state")
    parser.add_argument("--rooms", type=int, default=5000)
    parser.add_argument("--single-steps", type=int, default=400, help="steps of single pictures")
    parser.add_argument("--steps", type=int, default=1500, help="steps of conversations about walks")
    parser.add_argument(
        "--batch", type=int, default=8, help="conversations a step; of single pictures eight times as many"
    )
    parser.add_argument("--single-learning-rate", type=float, default=2e-3)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--test-rooms", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    questions = RoomQuestions(0, args.rooms, frames=FRAMES, per_type=3, rendered=args.data)
    processor = make_processor(RoomQuestions(0, min(300, args.rooms), frames=FRAMES, rendered=args.data))
    held_out = RoomQuestions(FIRST_HELD_OUT + 10_000, args.test_rooms, frames=FRAMES)
    held_out = [held_out[index] for index in range(len(held_out))]
    torch.manual_seed(args.seed)
    model = Qwen2_5_VLForConditionalGeneration(make_config(processor.tokenizer))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    collate, conversations = Spa3VLMCollator(processor), RoomConversations(questions)

    def loss(examples: list[dict]) -> dict[str, torch.Tensor]:
        batch = collate(examples)
        unused = (*VIEW_KEYS, "skipped", "num_rows")
        return {"loss": model(**{key: value for key, value in batch.items() if key not in unused}).loss}

    def single_pictures(rng: np.random.Generator) -> dict[str, torch.Tensor]:
        return loss([conversations.draw_one(rng) for _ in range(FRAMES * args.batch)])

    def walks(rng: np.random.Generator) -> dict[str, torch.Tensor]:
        return loss([conversations.draw(rng) for _ in range(args.batch)])

    def evaluate() -> dict[str, float]:
        report = evaluate_answers(model, processor.vlm_processor, held_out, batch_size=20, max_new_tokens=6)
        print(score_table({"VLM": report}), flush=True)
        return report.scores

    for name, step, measure, steps, rate, every in (
        ("vlm_single", single_pictures, dict, args.single_steps, args.single_learning_rate, 100),
        ("vlm", walks, evaluate, args.steps, args.learning_rate, 250),
    ):
        train(name, model, step, measure, args.output, steps, rate, args.seed, every)
    model.save_pretrained(args.output / "vlm")
    processor.vlm_processor.save_pretrained(args.output / "vlm")


if __name__ == "__main__":
    main()
