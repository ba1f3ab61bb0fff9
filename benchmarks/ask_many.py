"""18 questions about one scene of 32 frames, the average of VSI-Bench: encoded once, or each question asked alone.

Three families with random weights of medium size, in float32 with greedy decoding, the prompts of VSI-Bench about a
rendered room, its 16 new tokens. Asking alone runs a whole prompt for each question; asking many uses ``encode_scene``
and ``ask``, measured before, in the middle and after; the median is reported. On a CPU the seconds are CPU
time of the process, so that other programs don't count. The exit code is 1 if an answer differs.

    python benchmarks/ask_many.py
    python benchmarks/ask_many.py --width 518   # frames as large as those of VSI-Bench
"""

import argparse
import platform
import statistics
import sys
import time

import torch
import transformers
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GotOcr2ImageProcessor,
    InternVLProcessor,
    InternVLVideoProcessor,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from spa3r import Spa3RConfig, Spa3RImageProcessor, Spa3RModel, Spa3VLM, Spa3VLMProcessor, VggtConfig
from spa3r.rooms import RoomWalk, camera_walk, generate_room, render, room_questions
from spa3r.rooms.embedded import embedded_model
from spa3r.vsi_bench.format import make_prompt

TEXT = {
    **{"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "max_position_embeddings": 32768},
    **{"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": False},
    "initializer_range": 0.05,
}
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
VISION = {"depth": 8, "hidden_size": 256, "intermediate_size": 768, "num_heads": 4, "out_hidden_size": 512}
TOWER = {"num_hidden_layers": 8, "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4}
SPA3R = {"hidden_size": 256, "num_attention_heads": 4, "num_latents": 128, "num_encoder_layers": 4}
VGGT = {
    **{"hidden_size": 192, "num_attention_heads": 3, "num_hidden_layers": 4},
    **{"patch_embedding_num_layers": 4, "patch_embedding_num_heads": 3, "dpt_layers": [0, 1, 2, 3]},
}
INTERNVL_SIDE, VOCABULARY = 224, 16000


def build(family: str, texts: list[str]) -> tuple[AutoConfig, transformers.ProcessorMixin]:
    """A medium-size configuration of a family and its processor, with a tokenizer trained on the given texts."""
    embedded = embedded_model()[1]
    template = embedded.chat_template
    # As many tokens per question as with a large vocabulary.
    tokenizer = embedded.tokenizer.train_new_from_iterator(texts, vocab_size=2000, show_progress=False)
    text = TEXT | {"vocab_size": VOCABULARY}
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    ids = tokenizer.get_vocab()
    if family == "internvl":
        names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
        tokenizer.add_tokens([*names.values(), "<video>"], special_tokens=True)
        for name, token in (names | {"video_token": "<video>"}).items():
            setattr(tokenizer, name, token)
            setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
        size = {"height": INTERNVL_SIDE, "width": INTERNVL_SIDE}
        processor = InternVLProcessor(
            image_processor=GotOcr2ImageProcessor(size=size, max_patches=1),
            video_processor=InternVLVideoProcessor(size=size),
            tokenizer=tokenizer,
            image_seq_length=(INTERNVL_SIDE // 28) ** 2,
            chat_template=template.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\\n"),
        )
        config = AutoConfig.for_model(
            "internvl",
            text_config=text | {"model_type": "qwen2"},
            vision_config=TOWER | {"image_size": INTERNVL_SIDE, "patch_size": 14},
            image_token_id=tokenizer.context_image_token_id,
            image_seq_length=processor.image_seq_length,
        )
        return config, processor
    places = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    places |= {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    patch = 14 if family == "qwen2_5_vl" else 16
    sizes = {"patch_size": patch, "size": {"shortest_edge": 56 * 56, "longest_edge": 1280 * 28 * 28}}
    processor_class, video_class = (
        (Qwen2_5_VLProcessor, Qwen2VLVideoProcessor)
        if family == "qwen2_5_vl"
        else (Qwen3VLProcessor, Qwen3VLVideoProcessor)
    )
    processor = processor_class(
        image_processor=Qwen2VLImageProcessor(**sizes),
        video_processor=video_class(**sizes),
        tokenizer=tokenizer,
        chat_template=template,
    )
    own = {"fullatt_block_indexes": [3, 7]} if family == "qwen2_5_vl" else {"deepstack_visual_indexes": [2, 4, 6]}
    config = AutoConfig.for_model(
        family,
        text_config=text | {"rope_parameters": ROPE},
        vision_config=VISION | {"patch_size": patch} | own,
        tie_word_embeddings=False,
        **{f"{name}_token_id": ids[token] for name, token in places.items()},
    )
    return config, processor


def composed(family: str, width: int, texts: list[str], device: str) -> tuple[Spa3VLM, Spa3VLMProcessor]:
    """A Spa3-VLM with random weights that all affect the output."""
    torch.manual_seed(0)
    config, vlm_processor = build(family, texts)
    vlm = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    spa3r = Spa3RModel(Spa3RConfig(backbone_config=VggtConfig(**VGGT), semantic_hidden_size=64, **SPA3R))
    model = Spa3VLM.from_vlm_and_spa3r(vlm, spa3r, initializer_range=0.05)
    with torch.no_grad():
        model.adapter.bottleneck.fc2.weight.normal_(std=0.05)
    processor = Spa3VLMProcessor(vlm_processor, Spa3RImageProcessor(size=width), image_token_id=config.image_token_id)
    return model.to(device).eval(), processor


def frames_and_questions(frames: int, count: int, width: int) -> tuple[list[Image.Image], list[str]]:
    """The views of a camera walk through a room, and questions about it of all types."""
    for seed in range(100):
        room = generate_room(seed, level=2)
        cameras = camera_walk(room, frames, size=(width * 3 // 4, width))
        rows = room_questions(RoomWalk.from_cameras(room, cameras), per_type=3)
        if len(rows) >= count:
            views = render(room, cameras).images
            return [Image.fromarray(view) for view in views], [make_prompt(row) for row in rows[:count]]
    raise RuntimeError(f"No room allows {count} questions.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="+", default=["qwen2_5_vl", "qwen3_vl", "internvl"])
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--questions", type=int, default=18)
    parser.add_argument("--width", type=int, default=224, help="of a frame, in pixels; heights are 3/4 of it")
    parser.add_argument("--new-tokens", type=int, default=16)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    print(f"{name}, {torch.get_num_threads()} threads; torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}; float32, random weights")
    print(f"{args.questions} questions about {args.frames} frames {args.width} wide, {args.new_tokens} new tokens")
    print(f"{'family':<12}{'weights':>9}{'prefix':>8}{'question':>9}", end="")
    print(f"{'alone':>10}{'encode':>9}{'ask':>8}{'together':>10}{'alone/together':>16}{'same answers':>14}", flush=True)
    pictures, questions = frames_and_questions(args.frames, args.questions, args.width)
    generation = {"do_sample": False, "max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens}
    differ = 0
    for family in args.family:
        model, processor = composed(family, args.width, questions, device)
        # An image token among random words would require one more picture.
        special = sorted(processor.tokenizer.get_added_vocab().values())
        generation["suppress_tokens"] = [*special, *range(len(processor.tokenizer), VOCABULARY)]

        def clock() -> float:
            if device == "cpu":
                return time.process_time()
            torch.cuda.synchronize()
            return time.perf_counter()

        def alone(question: str) -> str:
            content = [*({"type": "image", "image": p} for p in pictures), {"type": "text", "text": question}]
            inputs = processor.apply_chat_template(  # noqa: B023
                [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True
            ).to(device)
            output = model.generate(**inputs, **generation)  # noqa: B023
            return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()  # noqa: B023

        def many(encode_seconds: list[float], ask_seconds: list[float]) -> tuple[list[str], int]:
            start = clock()
            scene = model.encode_scene(processor, pictures)  # noqa: B023
            encoded = clock()
            answers = model.ask(scene, questions, **generation)  # noqa: B023
            encode_seconds.append(encoded - start)
            ask_seconds.append(clock() - encoded)
            return answers, len(scene)

        model.ask(model.encode_scene(processor, pictures[:2]), questions[:2], **generation)  # warm-up
        encode_seconds, ask_seconds, alone_seconds, theirs = [], [], [], []
        answers, prefix = many(encode_seconds, ask_seconds)
        for index, question in enumerate(questions):
            start = clock()
            theirs.append(alone(question))
            alone_seconds.append(clock() - start)
            if index in (len(questions) // 2, len(questions) - 1):
                assert many(encode_seconds, ask_seconds)[0] == answers
        same = sum(ours == their for ours, their in zip(answers, theirs))
        differ += len(questions) - same
        encode, ask = statistics.median(encode_seconds), statistics.median(ask_seconds)
        total = statistics.median(e + a for e, a in zip(encode_seconds, ask_seconds))
        words = statistics.mean(len(processor.tokenizer(question)["input_ids"]) for question in questions)
        weights = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        print(f"{family:<12}{weights:>7.0f} M{prefix:>8}{words:>9.0f}{sum(alone_seconds):>8.1f} s", end="")
        print(f"{encode:>7.1f} s{ask:>6.1f} s{total:>8.1f} s{sum(alone_seconds) / total:>16.1f}", end="")
        print(f"{f'{same} of {len(questions)}':>14}", flush=True)
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
