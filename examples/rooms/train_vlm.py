"""Step 8 of the rooms recipe: train a small VLM, shaped like Qwen2.5-VL, to see rooms and to answer questions.

It starts from random weights and learns without Spa3R, in four stages. First, the vision tower learns which objects
every image token shows: the token approaches the embeddings of the words that name them. Then the tower is
frozen, and the language model learns to attend from names to pictures. Its upper layers learn to calculate with
positions, from questions without pictures. Finally, all of its layers learn from questions about walks.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import FIRST_HELD_OUT, RenderedRooms, reduced_precision, train
from conversations import BACK, FRAMES, WALKS, WORDS, Conversations
from questions import CODE_WIDTH, LOOKING, Questions, answer_loss, calculating, place_code
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from spa3r import Spa3RImageProcessor, Spa3VLMProcessor
from spa3r.evaluation import evaluate_answers, score_table
from spa3r.rooms import COLORS, FURNITURE, generate_room
from spa3r.rooms.instructions import RoomQuestions

VIEW_SIZE = 112
CELL = 28
"""Side in pixels of the picture region of one vision token."""

SPECIAL_TOKENS = {
    "pad_token": "<|endoftext|>",
    "eos_token": "<|im_end|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}
            {%- if message['content'] is string -%}
                {{- message['content'] -}}
            {%- else -%}
                {%- for item in message['content'] -%}
                    {{- item['text'] -}}
                {%- endfor -%}
            {%- endif -%}
            {{- '<|im_end|>' -}}
        {%- endgeneration -%}
        {{- '\\n' -}}
    {%- else -%}
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
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def make_processor(texts: list[str]) -> Spa3VLMProcessor:
    """Qwen2.5-VL's processor with a small byte-level BPE that is trained on some texts.

    Names and digits are separate tokens, so that they are spelled the same everywhere, and every line begins with a
    token of its own. Anything in between that is one of the texts may become one token, so a question of the benchmark
    has ten or twenty.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("(?<=assistant)\n"), "isolated"),  # the prompt for an answer ends there
            pre_tokenizers.Split(Regex("\n"), "merged_with_next"),
            pre_tokenizers.Split(Regex(rf"\b({'|'.join(FURNITURE)})\b|\b({'|'.join(COLORS)}) "), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder, bpe.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = texts + ["user", "assistant"] * len(texts)
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=2048, initial_alphabet=alphabet, show_progress=False))
    standard = {name: token for name, token in SPECIAL_TOKENS.items() if name in ("pad_token", "eos_token")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        chat_template=CHAT_TEMPLATE,
        **standard,
        extra_special_tokens={name: token for name, token in SPECIAL_TOKENS.items() if name not in standard},
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.add_tokens(["<|im_start|>", "<|vision_start|>", "<|vision_end|>"], special_tokens=True)
    size = {"shortest_edge": CELL**2, "longest_edge": (2 * VIEW_SIZE) ** 2}  # in pixels, although the names say edges
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
            "num_hidden_layers": 6,
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


class Eyes(nn.Module):
    """The vision tower; the content of a token is read off its similarity to the embeddings of words."""

    def __init__(self, vlm: Qwen2_5_VLForConditionalGeneration, processor: Spa3VLMProcessor):
        super().__init__()
        self.tower, self.embeddings = vlm.model.visual, vlm.get_input_embeddings()
        self.processor = processor.vlm_processor.image_processor
        self.words = [torch.tensor(processor.tokenizer.encode(word)) for word in WORDS]  # mostly one token
        self.bias = nn.Parameter(torch.full((len(WORDS),), -3.0))

    def tokens(self, images: np.ndarray) -> Tensor:  # (V, H, W, 3) uint8 -> (V * cells, h)
        inputs = self.processor(images=list(images), return_tensors="pt")
        return self.tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output

    def names(self, tokens: Tensor) -> Tensor:  # -> (V * cells, names), logits
        words = torch.stack([self.embeddings(word).mean(0) for word in self.words])
        return tokens @ words.T + self.bias


class RoomCells:
    """What the cells of pictures show; each cell is a token of the vision tower."""

    def __init__(self, data: RenderedRooms):
        self.data = data
        self.names = np.zeros((len(data.seeds), 256, len(WORDS)), np.float32)  # for every id of a room; 0 is no object
        for row, seed in zip(self.names, data.seeds):
            for number, item in enumerate(generate_room(int(seed), 0).objects, start=1):
                row[number, [WORDS.index(item.name), WORDS.index(f"{item.color} ")]] = 1

    def __call__(self, rooms: np.ndarray, frames: np.ndarray) -> Tensor:
        """(pictures,) each -> (pictures * cells, names): how clearly a cell shows the named object, 0 to 1."""
        grid = VIEW_SIZE // CELL
        names = self.names[rooms[:, None, None], self.data.instance_ids[rooms, frames]]
        shares = torch.from_numpy(names).unflatten(1, (grid, -1)).unflatten(3, (grid, -1)).mean((2, 4)).flatten(0, 2)
        return (4 * shares).clamp(max=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder of render.py and conversations.py")
    parser.add_argument("output", type=Path, help="folder for the VLM, its log and its state")
    parser.add_argument("--vision-steps", type=int, default=1500, help="steps of the vision tower alone")
    parser.add_argument("--vision-rooms", type=int, default=1500, help="rooms that the vision tower learns from")
    parser.add_argument("--vision-batch", type=int, default=64, help="pictures a step")
    parser.add_argument("--place-steps", type=int, default=2200, help="steps of questions without pictures")
    parser.add_argument("--place-batch", type=int, default=24, help="rooms a step, with 8 questions about each")
    parser.add_argument("--looking-steps", type=int, default=600, help="steps of questions about walks, to look")
    parser.add_argument("--steps", type=int, default=1000, help="steps of questions about walks, to calculate")
    parser.add_argument("--batch", type=int, default=8, help="walks a step")
    parser.add_argument("--questions", type=int, default=16, help="questions about each")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the language model, for AdamW")
    parser.add_argument("--muon-learning-rate", type=float, default=0.015, help="for its matrices")
    parser.add_argument("--test-rooms", type=int, default=40)
    parser.add_argument("--every", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    conversations = Conversations(args.data)
    processor = make_processor(conversations.texts(400))
    held_out = RoomQuestions(FIRST_HELD_OUT + 10_000, args.test_rooms, frames=FRAMES)
    held_out = [held_out[index] for index in range(len(held_out))]
    torch.manual_seed(args.seed)
    model = Qwen2_5_VLForConditionalGeneration(make_config(processor.tokenizer))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    eyes = Eyes(model, processor)

    def learn_names() -> None:
        data, unseen = RenderedRooms.read(args.data, args.vision_rooms), RenderedRooms.held_out(args.test_rooms)
        cells, unseen_cells = RoomCells(data), RoomCells(unseen)

        def look(rng: np.random.Generator) -> dict[str, Tensor]:
            rooms = rng.choice(len(data.seeds), args.vision_batch)
            frames = rng.integers(0, data.images.shape[1], len(rooms))
            with reduced_precision():
                tokens = eyes.tokens(data.images[rooms, frames])
                logits = eyes.names(tokens)
            loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), cells(rooms, frames), reduction="sum")
            # Short tokens contain little besides names; long ones would dominate them.
            return {"names": loss / len(logits), "length": 0.003 * tokens.float().square().sum(-1).mean()}

        def measure() -> dict[str, float]:
            """Recall of the words for what cells clearly show, and precision of the words found."""
            rooms, frames = (grid.ravel() for grid in np.mgrid[: len(unseen.seeds), :16:4])
            found, truth = eyes.names(eyes.tokens(unseen.images[rooms, frames])) > 0, unseen_cells(rooms, frames)
            kinds = np.s_[:, : len(FURNITURE)]
            return {
                "held_out_kinds_found": found[kinds][truth[kinds] > 0.5].float().mean().item(),
                "held_out_kinds_right": (truth[kinds] > 0)[found[kinds]].float().mean().nan_to_num().item(),
                "held_out_names_found": found[truth > 0.5].float().mean().item(),
                "held_out_names_right": (truth > 0)[found].float().mean().nan_to_num().item(),
            }

        train("vlm_vision", eyes, look, measure, args.output, args.vision_steps, 2e-3, args.seed, args.every, 0.02)

    objects = conversations.objects()
    cells, patches = (VIEW_SIZE // CELL) ** 2, VIEW_SIZE // 14

    told: list[tuple[Tensor, Tensor]] = []

    def tell(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Add position codes to some tokens from this layer on."""
        hidden, (code, is_told) = inputs[0].float(), told[-1]
        known, length = nn.functional.rms_norm(hidden, hidden.shape[-1:]), hidden.square().mean(-1, keepdim=True).sqrt()
        missing = (code - known)[..., :CODE_WIDTH] * length * is_told[..., None]
        return (hidden + nn.functional.pad(missing, (0, hidden.shape[-1] - CODE_WIDTH))).to(inputs[0]), *inputs[1:]

    def talk_about_pictures(seen: Tensor, shown: dict[str, Tensor]) -> Callable[..., dict[str, Tensor]]:
        questions = Questions(conversations, model, processor.tokenizer, cells)
        grids = torch.tensor([[1, patches, patches]]).repeat(FRAMES * args.batch, 1)

        def talk(rng: np.random.Generator) -> dict[str, Tensor]:
            """In half of the rooms image tokens get the positions of the objects they show, in a quarter names do."""
            rooms, inputs = questions.draw(rng, args.batch, args.questions)
            ids, labels, tokens = inputs["input_ids"], inputs.pop("labels")[:, 1:], seen[rooms]
            noisy = shown["places"][rooms] + torch.from_numpy(rng.normal(scale=0.3, size=(*tokens.shape[:2], 2)))
            turn = torch.arange(args.batch) % 4
            is_told = shown["is_clear"][rooms] & ((turn == 1) | (turn == 2))[:, None]
            tokens = tokens + is_told[..., None] * place_code(noisy.float())
            places, is_meant = questions.meant(ids, objects["words"][rooms], objects["middles"][rooms])
            told[:] = [(place_code(places), is_meant & (turn == 3)[:, None])]
            looked = BaseModelOutputWithPooling(pooler_output=tokens.flatten(0, 1).split(cells))
            with reduced_precision():
                output = model(
                    **inputs,
                    image_grid_thw=grids,
                    mm_encoder_outputs={"image": looked},
                    output_attentions=True,
                    output_hidden_states=True,
                )
            shows = questions.shows(ids, shown["names"][rooms])
            is_found = is_meant & (shows & is_told[:, None]).any(-1)
            hidden = output.hidden_states[LOOKING][is_found].float()
            known = nn.functional.rms_norm(hidden, hidden.shape[-1:])[:, :CODE_WIDTH]
            wrong = (known - place_code(places[is_found])[:, :CODE_WIDTH]).square()
            return {
                "loss": answer_loss(output.logits, labels),
                "looking": 0.3 * questions.looking(output.attentions, shows),
                "places": 0.05 * wrong.sum() / max(1, len(wrong)),
            }

        return talk

    def talk_alone(batch: int) -> Callable[..., dict[str, Tensor]]:
        """Questions without pictures, in which names carry the positions of their objects."""
        questions = Questions(conversations, model, processor.tokenizer, cells, frames=0)

        def talk(rng: np.random.Generator) -> dict[str, Tensor]:
            rooms, inputs = questions.draw(rng, batch, 8)
            labels = inputs.pop("labels")[:, 1:]
            places, is_meant = questions.meant(inputs["input_ids"], objects["words"][rooms], objects["middles"][rooms])
            told[:] = [(place_code(places), is_meant)]
            with reduced_precision():
                return {"loss": answer_loss(model(**inputs).logits, labels)}

        return talk

    def measure() -> dict[str, float]:
        told[:] = [(torch.zeros(1), torch.zeros(1))]
        report = evaluate_answers(model, processor.vlm_processor, held_out, batch_size=20, max_new_tokens=6)
        print(score_table({"VLM": report}), flush=True)
        return report.scores

    learn_names()
    for walk in WALKS:
        walks = Conversations(args.data, back=walk == BACK)
        seen_file, shown_file = (args.output / f"{name}{walk}.safetensors" for name in ("seen", "cells"))
        if not shown_file.exists():
            save_file(walks.cells(FRAMES * cells), shown_file)
        if not seen_file.exists():
            with torch.no_grad():  # the tower is frozen, so one pass is enough
                seen = torch.stack([eyes.tokens(pictures) for pictures in walks.pictures()])
            save_file({"made": seen.half()}, seen_file)
    seen, shown = load_file(args.output / "seen.safetensors")["made"], load_file(args.output / "cells.safetensors")
    about_pictures = talk_about_pictures(seen, shown)
    model.set_attn_implementation("eager")  # it returns the attention weights
    language = model.get_decoder()
    told_to = language.layers[LOOKING].register_forward_pre_hook(tell)
    rates = args.learning_rate, args.seed, args.every, args.muon_learning_rate
    gentle = args.learning_rate / 4, args.seed, args.every, args.muon_learning_rate / 4

    model.model.visual.requires_grad_(False)
    train("vlm_looking", model, about_pictures, dict, args.output, args.looking_steps, *rates)
    # The first layers would forget this while the others learn to calculate, and vice versa.
    model.requires_grad_(False)
    calculating(language).requires_grad_(True)
    train("vlm_places", model, talk_alone(args.place_batch), dict, args.output, args.place_steps, *rates)

    rehearse = talk_alone(max(1, args.place_batch // 3))

    def use_both(rng: np.random.Generator) -> dict[str, Tensor]:
        losses = about_pictures(rng)
        return losses | {"told": rehearse(rng)["loss"]}

    language.layers.requires_grad_(True)
    train("vlm", model, use_both, measure, args.output, args.steps, *gentle)

    told_to.remove()
    model.set_attn_implementation("sdpa")
    model.save_pretrained(args.output / "vlm")
    processor.vlm_processor.save_pretrained(args.output / "vlm")


if __name__ == "__main__":
    main()
