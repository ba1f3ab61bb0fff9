"""Combine a vision-language model with a Spa3R, check that its outputs are unchanged, and save the Spa3-VLM.

    python compose_vlm.py --model Qwen/Qwen3-VL-4B-Instruct --spa3r path/to/spa3r --output my-spa3-vlm

Without --model it combines the parts of the embedded model again.
"""

import argparse

import torch

from spa3r import Spa3VLM, Spa3VLMProcessor
from spa3r.rooms import camera_walk, generate_room, render
from spa3r.rooms.embedded import embedded_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id of a VLM; default: the embedded one")
    parser.add_argument("--spa3r", help="folder or hub id of a Spa3R; wanted with --model")
    parser.add_argument("--output", help="folder to save the Spa3-VLM in")
    args = parser.parse_args()
    if bool(args.model) != bool(args.spa3r):
        parser.error("--model and --spa3r go together")

    if args.model:
        model = Spa3VLM.from_vlm_and_spa3r(args.model, args.spa3r)
        processor = Spa3VLMProcessor.from_vlm_and_spa3r(args.model, args.spa3r)
    else:
        parts, processor = embedded_model()
        model = Spa3VLM.from_vlm_and_spa3r(parts.vlm, parts.spa3r)

    room = generate_room(seed=0, level=1)
    content = [{"type": "image", "image": view} for view in render(room, camera_walk(room, 2)).images]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": "What do you see?"}]}]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    ours = {*processor.view_image_processor.model_input_names, "image_tokens_per_scene"}
    with torch.no_grad():
        combined = model(**inputs).logits
        plain = model.vlm(**{name: value for name, value in inputs.items() if name not in ours}).logits
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(f"{model.vlm.config.model_type}: logits as before: {torch.equal(combined, plain)}")
    print(f"parameters: {model.num_parameters():,}, of which {trained:,} are trained; the adapter is untrained")
    if args.output:
        model.save_pretrained(args.output)
        processor.save_pretrained(args.output)


if __name__ == "__main__":
    main()
