"""A Spa3-VLM with the released model's sizes, random weights, bf16: does it run on this machine, and at what cost?

The sizes are those of Qwen2.5-VL-3B, VGGT-1B and Spa3R; four rendered pictures of 640 x 480; the embedded model's
tokenizer. The weights are random, so the answer is noise; only the cost matters. Prints memory and time.

    python benchmarks/real_size.py
"""

import argparse
import platform
import resource
import time

import torch
import transformers
from encode import make_config
from PIL import Image
from transformers import Qwen2_5_VLConfig

import spa3r
from spa3r.rooms import camera_walk, generate_room, render
from spa3r.rooms.embedded import embedded_model

# The published configuration of Qwen2.5-VL-3B-Instruct.
TEXT = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_window_layers": 70,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}
VISION = {
    "hidden_size": 1280,
    "out_hidden_size": 2048,
    "depth": 32,
    "num_heads": 16,
    "intermediate_size": 3420,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "window_size": 112,
}


def peak_gib() -> float:
    """The peak resident memory of the process so far (Linux counts it in KiB)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def released_vlm(
    device: str, layers: int | None = None, dtype: torch.dtype = torch.bfloat16
) -> tuple[spa3r.Spa3VLM, spa3r.Spa3VLMProcessor]:
    """The model with random weights, and a processor with the embedded model's tokenizer.

    Args:
        device: Where the weights are made.
        layers: Layers of each stack; None: all.
        dtype: Dtype of the weights.
    """
    _, embedded = embedded_model()
    tokens = {
        name: embedded.tokenizer.convert_tokens_to_ids(token)
        for name, token in (
            ("image_token_id", "<|image_pad|>"),
            ("video_token_id", "<|video_pad|>"),
            ("vision_start_token_id", "<|vision_start|>"),
            ("vision_end_token_id", "<|vision_end|>"),
        )
    }
    text, vision, own = TEXT, VISION, None
    if layers is not None:
        text, vision = TEXT | {"num_hidden_layers": layers}, VISION | {"depth": layers, "fullatt_block_indexes": [0]}
        own = make_config(layers, None)
    vlm_config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = spa3r.Spa3VLM(spa3r.Spa3VLMConfig(vlm_config=vlm_config, spa3r_config=own)).eval()
    torch.set_default_dtype(torch.float32)
    embedded.vlm_processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    processor = spa3r.Spa3VLMProcessor(embedded.vlm_processor, image_token_id=tokens["image_token_id"])
    return model, processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=8)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    start = time.perf_counter()
    model, processor = released_vlm(device)
    built = time.perf_counter() - start

    room = generate_room(seed=0, level=2)
    views = render(room, camera_walk(room, args.pictures, size=(480, 640)))
    content = [{"type": "image", "image": Image.fromarray(view)} for view in views.images]
    content.append({"type": "text", "text": "How far is the sofa from the door?"})
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True
    ).to(device)
    start = time.perf_counter()
    output = model.generate(**inputs, do_sample=False, max_new_tokens=args.new_tokens, min_new_tokens=args.new_tokens)
    answered = time.perf_counter() - start

    parameters = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in model.named_children()}
    name = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    print(f"{name}; torch {torch.__version__}, transformers {transformers.__version__}, bf16, random weights")
    print("parameters (millions): " + ", ".join(f"{part} {count:.0f}" for part, count in parameters.items()))
    print(f"pictures {args.pictures} x 640 x 480; image tokens {int(inputs['image_tokens_per_scene'].sum())}; ", end="")
    print(
        f"prompt {inputs['input_ids'].shape[1]} tokens; answer {output.shape[1] - inputs['input_ids'].shape[1]} tokens"
    )
    print(f"build {built:.0f} s; pictures to answer {answered:.0f} s; peak memory {peak_gib():.1f} GiB")


if __name__ == "__main__":
    main()
