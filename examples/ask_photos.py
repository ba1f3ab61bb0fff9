"""Ask a Spa3-VLM about photos of a place.

Without photos it uses a rendered room. Without --model it asks the embedded model, which was trained on
rendered rooms only.

    python ask_photos.py --model path/to/spa3-vlm kitchen_1.jpg kitchen_2.jpg --question "How many chairs are there?"
"""

import argparse

from spa3r import Spa3VLM, Spa3VLMProcessor
from spa3r.rooms import camera_walk, generate_room, render
from spa3r.rooms.embedded import embedded_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="*", help="files or URLs, all of one place; default: a rendered room")
    parser.add_argument("--question", default="How many chairs are in the room?")
    parser.add_argument("--model", help="folder or hub id of a Spa3-VLM; default: the embedded model")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    if args.model:
        model = Spa3VLM.from_pretrained(args.model, dtype="auto")
        processor = Spa3VLMProcessor.from_pretrained(args.model)
    else:
        model, processor = embedded_model()
    model = model.to(args.device).eval()

    room = generate_room(seed=0, level=1)
    photos = args.photos or list(render(room, camera_walk(room, 6)).images)
    content = [{"type": "image", "image": photo} for photo in photos]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": args.question}]}]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    words = model.generate(**inputs.to(model.device), max_new_tokens=32, do_sample=False)
    answer = processor.decode(words[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    print(f"{len(photos)} photos. {args.question}\n{answer}")


if __name__ == "__main__":
    main()
