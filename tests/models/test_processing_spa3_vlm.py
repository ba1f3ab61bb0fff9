"""Messages in every form become the VLM's own inputs and packed views, and both see the same pixels."""

import base64
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from media import counting_frames, counting_video, data_url, encoded, noise, read_number, served, user, write_video
from PIL import Image
from tiny import spa3r_config, vggt_config
from transformers import AutoProcessor, AutoTokenizer
from vlm_families import FAMILIES, build, build_processor

from spa3r import Spa3RImageProcessor, Spa3RModel, Spa3VLMForConditionalGeneration, Spa3VLMProcessor
from spa3r.models.spa3_vlm.fingerprints import processor_fingerprint

SIZE = 70
IMAGE_TOKEN = "<|image_pad|>"
VIEW_KEYS = {"view_pixel_values", "view_grid_hw", "views_per_scene", "image_tokens_per_scene"}


def make(name: str = "qwen2_5_vl", **kwargs) -> Spa3VLMProcessor:
    vlm_processor = build_processor(name)
    token_id = vlm_processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) if "qwen" in name else None
    return Spa3VLMProcessor(vlm_processor, Spa3RImageProcessor(size=SIZE), **({"image_token_id": token_id} | kwargs))


@pytest.fixture(scope="module")
def processor():
    return make()


def inputs_of(processor, conversation, **kwargs):
    return processor.apply_chat_template(conversation, tokenize=True, return_dict=True, **kwargs)


def assert_same(ours, reference) -> None:
    assert ours.keys() == reference.keys()
    for key, value in reference.items():
        assert torch.equal(torch.as_tensor(ours[key]), torch.as_tensor(value)), key


def pictures_seen_by_qwen(inputs, patch: int = 14, merge: int = 2) -> list[np.ndarray]:
    """Qwen's normalized patches put together again: of every picture (H, W, 3)."""
    pictures, rows = [], iter(inputs["pixel_values"].split(inputs["image_grid_thw"].prod(-1).tolist()))
    for _, height, width in inputs["image_grid_thw"].tolist():
        patches = next(rows).view(height // merge, width // merge, merge, merge, 3, -1, patch, patch)[..., 0, :, :]
        # (H, W of tokens, rows and columns of patches in a token, channel, rows and columns of a patch)
        pictures.append(patches.permute(0, 2, 5, 1, 3, 6, 4).reshape(height * patch, width * patch, 3).numpy())
    return pictures


# Pictures -------------------------------------------------------------------------------------------------------------

PICTURE, OTHER = noise(90, 60, 0), noise(40, 80, 1)


@pytest.fixture(scope="module")
def reference(processor):
    return inputs_of(processor, user(PICTURE, OTHER, "Which is closer?"), add_generation_prompt=True)


BARE = base64.b64encode(encoded(PICTURE)).decode()
FORMS = {
    "picture": lambda file: {"image": PICTURE},
    "string_in_image": lambda file: {"image": str(file)},
    "path_in_image": lambda file: {"image": file},
    "url": lambda file: {"url": str(file)},
    "string": lambda file: {"path": str(file)},
    "path": lambda file: {"path": file},
    "base64": lambda file: {"base64": BARE},
    "base64_with_header": lambda file: {"base64": data_url(PICTURE)},
    "base64_with_bytes": lambda file: {"base64": encoded(PICTURE)},
    "base64_in_image": lambda file: {"image": BARE},
    "bytes": lambda file: {"image": encoded(PICTURE)},
    "file_url": lambda file: {"image": f"file://{file}"},
    "data_url_of_qwen": lambda file: {"image": f"data:image;base64,{BARE}"},
    "image_url": lambda file: {"type": "image_url", "image_url": {"url": f"file://{file}"}},
    "image_url_in_url": lambda file: {"type": "image_url", "url": data_url(PICTURE)},
    "array_of_one": lambda file: {"image": np.array(PICTURE)[None]},
    "tensor_of_one": lambda file: {"image": torch.from_numpy(np.array(PICTURE)).permute(2, 0, 1)[None]},
    "data_url": lambda file: {"url": data_url(PICTURE)},
    "array": lambda file: {"image": np.array(PICTURE)},
    "tensor": lambda file: {"image": torch.from_numpy(np.array(PICTURE)).permute(2, 0, 1)},
    "openai": lambda file: {"type": "image_url", "image_url": {"url": data_url(PICTURE), "detail": "high"}},
    "openai_short": lambda file: {"type": "image_url", "image_url": str(file)},
    "many_keys": lambda file: {"image": None, "path": str(file), "url": None},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_picture_gives_the_same_inputs(processor, reference, form, tmp_path):
    PICTURE.save(tmp_path / "picture.png")
    conversation = user(PICTURE, OTHER, "Which is closer?")
    conversation[0]["content"][0] = {"type": "image"} | FORMS[form](tmp_path / "picture.png")
    assert_same(inputs_of(processor, conversation, add_generation_prompt=True), reference)


def test_inputs_are_the_vlms_and_the_views(processor, reference):
    vlm = build_processor("qwen2_5_vl").apply_chat_template(
        user(PICTURE, OTHER, "Which is closer?"), tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert reference.keys() == vlm.keys() | VIEW_KEYS
    assert reference["views_per_scene"].tolist() == [2]
    views = Spa3RImageProcessor(size=SIZE)([PICTURE, OTHER])
    for key, value in views.items():
        assert torch.equal(reference[key], value)
    marks = reference["input_ids"] == processor.image_token_id
    assert reference["image_tokens_per_scene"].tolist() == marks.sum(-1).tolist() == [2 * 1 + 2 * 2]
    assert set(reference) <= {*processor.model_input_names, "mm_token_type_ids"}


def test_the_layout_stays_on_the_cpu(reference):
    moved = deepcopy(reference).to("meta", torch.bfloat16)
    layout = VIEW_KEYS - {"view_pixel_values"}
    assert {key for key in moved if moved[key].device.type == "cpu"} == layout
    assert moved["pixel_values"].dtype == moved["view_pixel_values"].dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_aligned_the_vlm_sees_the_views_pixels(processor, mode):
    processor = make()
    processor.view_image_processor.mode = mode
    pictures = [noise(90, 60, 0), noise(40, 80, 1), noise(200, 61, 2), noise(70, 70, 3)]
    inputs = inputs_of(processor, user(*pictures, "What is this?"))
    mean, std = (np.array(getattr(processor.image_processor, name), np.float32) for name in ("image_mean", "image_std"))
    views = processor.view_image_processor.unpack(inputs["view_pixel_values"], inputs["view_grid_hw"])
    for seen, view in zip(pictures_seen_by_qwen(inputs), views, strict=True):
        height, width = (side // 28 * 28 for side in view.shape[:2])
        cut = view[: max(height, 28), : max(width, 28)]
        assert seen.shape == cut.shape
        assert np.abs(seen - (cut / np.float32(255) - mean) / std).max() < 1e-5


def test_aligned_leaves_a_view_smaller_than_a_token_alone():
    inputs = inputs_of(make(), user(noise(300, 40), "What is this?"))  # a view of 14 x 70
    assert (inputs["view_grid_hw"] * 14).tolist() == [[14, 70]]
    assert inputs["image_tokens_per_scene"].tolist() == [inputs["image_grid_thw"].prod() // 4]


def test_native_the_vlm_sees_the_pictures_as_they_are():
    pictures = [noise(84, 56, 0), noise(56, 112, 1)]
    inputs, plain = (
        inputs_of(p, user(*pictures, "What is this?"), return_tensors="pt")
        for p in (make(image_mode="native"), build_processor("qwen2_5_vl"))
    )
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 6], [1, 8, 4]]
    for key, value in plain.items():
        assert torch.equal(inputs[key], value), key
    assert (inputs["view_grid_hw"] * 14).tolist() == [[42, 70], [70, 70]]


def test_native_shows_the_vlm_upright_pictures_without_transparency():
    rgba = noise(84, 56, channels=4)
    white = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    ours, reference = (inputs_of(make(image_mode="native"), user(picture, "?")) for picture in (rgba, white))
    assert_same(ours, reference)


@pytest.mark.parametrize("name", ["llava", "gemma3", "internvl", "mistral3"])
def test_other_vlms_see_whole_views(name):
    """Families that rescale to their own size get the views uncut."""
    processor = make(name)
    ((view,), (seen,)) = processor._load_views([noise(90, 60)])
    assert seen.size == view.size == (70, 42)
    inputs = inputs_of(processor, user(noise(90, 60), "What is this?"))
    assert VIEW_KEYS - {"image_tokens_per_scene"} <= inputs.keys() and "image_tokens_per_scene" not in inputs


# Videos ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["video", "url", "path"])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_video_is_its_frames_as_pictures(processor, tmp_path, key, kind):
    video = counting_video(tmp_path / "video.mp4", 20)
    conversation = [{"role": "user", "content": [{"type": "video", key: kind(video)}, {"type": "text", "text": "?"}]}]
    inputs = inputs_of(processor, conversation)
    views = processor.view_image_processor.unpack(inputs["view_pixel_values"], inputs["view_grid_hw"])
    assert [read_number(Image.fromarray(view)) for view in views] == [0, 4, 9, 14, 19]
    assert "pixel_values_videos" not in inputs and len(inputs["image_grid_thw"]) == 5
    assert inputs["views_per_scene"].tolist() == [5]


@pytest.mark.parametrize(("num_frames", "numbers"), [(None, [*range(9)]), (3, [0, 4, 8]), (1, [0]), (12, None)])
@pytest.mark.parametrize("where", ["call", "processor"])
def test_a_list_of_frames_is_a_video(num_frames, numbers, where):
    processor = make(num_frames=num_frames if where == "processor" else None)
    frames = counting_frames(9)
    conversation = [{"role": "user", "content": [{"type": "video", "video": frames}, {"type": "text", "text": "?"}]}]
    kwargs = {"num_frames": num_frames} if where == "call" else {}
    inputs = inputs_of(processor, conversation, **kwargs)
    views = processor.view_image_processor.unpack(inputs["view_pixel_values"], inputs["view_grid_hw"])
    expected = numbers or np.linspace(0, 8, 12).astype(int).tolist()
    assert [read_number(Image.fromarray(view)) for view in views] == expected


def test_frames_may_be_files_and_arrays(processor, tmp_path):
    frames = counting_frames(3)
    frames[0].save(tmp_path / "0.png")
    mixed = [str(tmp_path / "0.png"), np.array(frames[1]), frames[2]]
    stacked = np.stack([np.array(frame) for frame in frames])
    reference = inputs_of(processor, user(*frames, "?"))
    for video in (frames, tuple(frames), mixed, stacked, torch.from_numpy(stacked)):
        content = [{"type": "video", "video": video}, {"type": "text", "text": "?"}]
        assert_same(inputs_of(processor, [{"role": "user", "content": content}]), reference)


def test_the_calls_number_of_frames_wins_over_the_processors(tmp_path):
    video = counting_video(tmp_path / "video.mp4", 20)
    conversation = [{"role": "user", "content": [{"type": "video", "path": video}]}]
    processor = make(num_frames=6)
    assert inputs_of(processor, conversation)["views_per_scene"].tolist() == [6]
    assert inputs_of(processor, conversation, num_frames=2)["views_per_scene"].tolist() == [2]


def test_pictures_and_videos_of_all_turns_are_one_scene_in_order(processor):
    frames = counting_frames(5)
    conversation = [
        {"role": "system", "content": [{"type": "text", "text": "Answer briefly."}]},
        *user(frames[0], "One."),
        {"role": "assistant", "content": [{"type": "text", "text": "Fine."}]},
        {"role": "user", "content": ({"type": "video", "video": frames[1:4]}, {"type": "image", "image": frames[4]})},
    ]
    inputs = inputs_of(processor, conversation)
    views = processor.view_image_processor.unpack(inputs["view_pixel_values"], inputs["view_grid_hw"])
    assert [read_number(Image.fromarray(view)) for view in views] == [0, 1, 2, 3, 4]
    assert inputs["views_per_scene"].tolist() == [5]
    seen = [picture.mean() for picture in pictures_seen_by_qwen(inputs)]
    assert seen == sorted(seen) and len(seen) == 5


def test_pictures_and_videos_from_the_web(processor, tmp_path, reference):
    video = counting_video(tmp_path / "video.mp4", 8)
    with served({"/a.png": encoded(PICTURE), "/v.mp4": video.read_bytes()}) as address:
        for item in (
            {"type": "image", "url": f"{address}/a.png"},
            {"type": "image_url", "image_url": f"{address}/a.png"},
        ):
            conversation = user(PICTURE, OTHER, "Which is closer?")
            conversation[0]["content"][0] = item
            assert_same(inputs_of(processor, conversation, add_generation_prompt=True), reference)
        for key in ("video", "url"):
            content = [{"type": "video", key: f"{address}/v.mp4"}, {"type": "text", "text": "?"}]
            ours = inputs_of(processor, [{"role": "user", "content": content}], num_frames=3)
            content = [{"type": "video", "path": video}, {"type": "text", "text": "?"}]
            assert_same(ours, inputs_of(processor, [{"role": "user", "content": content}], num_frames=3))
        with pytest.raises(ValueError, match=r"http://\S+/missing.mp4 can't be decoded|doesn't exist"):
            inputs_of(processor, [{"role": "user", "content": [{"type": "video", "url": f"{address}/missing.mp4"}]}])


# Conversations --------------------------------------------------------------------------------------------------------


def test_text_only(processor):
    for conversation in (user("Hello there"), [{"role": "user", "content": "Hello there"}]):
        inputs = inputs_of(processor, conversation)
        assert inputs["views_per_scene"].tolist() == [0] == inputs["image_tokens_per_scene"].tolist()
        assert inputs["view_pixel_values"].shape == (0, 588) and inputs["view_grid_hw"].shape == (0, 2)
        assert "pixel_values" not in inputs
        assert "Hello there" in processor.decode(inputs["input_ids"][0])


def test_a_batch_is_its_conversations_padded_on_the_left(processor):
    conversations = [user(PICTURE, OTHER, "Which?"), user("Hello"), user(OTHER, "What is this, and why?")]
    batch, alone = inputs_of(processor, conversations), [inputs_of(processor, c) for c in conversations]
    assert batch["attention_mask"][:, -1].all() and not batch["attention_mask"].all()
    for row, inputs in enumerate(alone):
        mask = batch["attention_mask"][row].bool()
        assert torch.equal(batch["input_ids"][row][mask], inputs["input_ids"][0])
    for key in VIEW_KEYS | {"pixel_values"}:
        assert torch.equal(batch[key], torch.cat([inputs[key] for inputs in alone if key in inputs])), key
    assert batch["views_per_scene"].tolist() == [2, 0, 1]
    right = inputs_of(processor, conversations, processor_kwargs={"padding_side": "right"})
    assert right["attention_mask"][:, 0].all()


def test_text_ids_and_prompts(processor):
    conversation = user(PICTURE, "Which?")
    text = processor.apply_chat_template(conversation, tokenize=False)
    assert isinstance(text, str) and text == processor.apply_chat_template(conversation)
    assert text.count(IMAGE_TOKEN) == 1 and "Which?" in text
    prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
    assert prompt.startswith(text) and prompt.removeprefix(text) == "<|im_start|>assistant\n"
    assert processor.apply_chat_template([conversation, user("Hi")]) == [
        text,
        processor.apply_chat_template(user("Hi")),
    ]
    inputs = inputs_of(processor, conversation, add_generation_prompt=True)
    ids = processor.apply_chat_template(conversation, tokenize=True, add_generation_prompt=True)
    assert torch.equal(ids, inputs["input_ids"])
    assert processor.decode(ids[0]).replace(IMAGE_TOKEN * 2, IMAGE_TOKEN) == prompt
    assert processor.batch_decode(ids, skip_special_tokens=True) == processor.post_process_image_text_to_text(ids)
    assert processor.apply_chat_template(conversation, chat_template="{{ messages[0]['role'] }}!") == "user!"


def test_numpy_outputs(processor, reference):
    ours = inputs_of(
        processor, user(PICTURE, OTHER, "Which is closer?"), add_generation_prompt=True, return_tensors="np"
    )
    assert all(isinstance(value, np.ndarray) for value in ours.values())
    assert_same(ours, reference)


def test_assistant_tokens_mask_passes_through(processor):
    conversation = [*user(PICTURE, "Which?"), {"role": "assistant", "content": [{"type": "text", "text": "The lamp."}]}]
    for talk in (conversation, [conversation, conversation]):
        inputs = inputs_of(processor, talk, return_assistant_tokens_mask=True)
        mask = torch.as_tensor(inputs["assistant_masks"]).bool()
        assert mask.shape == inputs["input_ids"].shape
        for ids, marked in zip(inputs["input_ids"], mask):
            assert processor.decode(ids[marked]).startswith("The lamp.")


def test_the_users_messages_are_left_alone(processor, tmp_path):
    video = counting_video(tmp_path / "video.mp4", 4)
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "video", "path": str(video)}, {"type": "image", "image": PICTURE}]},
    ]
    before = deepcopy(conversation)
    for kwargs in ({}, {"tokenize": True}, {"tokenize": True, "return_dict": True}):
        processor.apply_chat_template([conversation, conversation], **kwargs)
        assert conversation == before
    assert conversation[1]["content"][1]["image"] is PICTURE


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"type": "audio", "audio": "a.wav"}, "must have type 'text', 'image' or 'video', got 'audio'. Leave it out"),
        ({"text": "no type"}, "must have type 'text', 'image' or 'video', got None"),
        (
            {"type": "image"},
            r"of type 'image' must hold its image under one of 'image', 'url', 'path', 'base64', got the",
        ),
        ({"type": "image", "picture": PICTURE}, r"got the keys \['picture', 'type'\]"),
        (
            {"type": "video", "image": PICTURE},
            r"of type 'video' must hold its video under one of 'video', 'url', 'path'",
        ),
        ({"type": "video", "video": []}, "A video given as a list must hold at least one frame, got none"),
        ({"type": "video", "path": "missing.mp4"}, "The video missing.mp4 doesn't exist. Check the path"),
        ({"type": "image", "path": "missing.png"}, "The picture missing.png doesn't exist. Check the path"),
        ({"type": "image_url"}, "A picture must be a PIL image, .* got NoneType"),
        ({"type": "image", "image": PICTURE, "resized_height": 280}, "A picture's 'resized_height' can't be used"),
        ({"type": "image", "image": PICTURE, "max_pixels": 9}, r"`processor.view_image_processor.size` for another"),
        ({"type": "image", "image": noise(5, 5)}, "Every picture must be at least one patch, 14 x 14 pixels"),
    ],
)
def test_bad_content_is_refused(processor, item, words):
    with pytest.raises(ValueError, match=words):
        inputs_of(processor, [{"role": "user", "content": [item]}])


@pytest.mark.parametrize("video", [counting_frames(3), "video.mp4"])
def test_number_of_frames_is_checked(processor, video, tmp_path):
    if isinstance(video, str):
        video = str(counting_video(tmp_path / video, 3))
    with pytest.raises(ValueError, match="`num_frames` must be a whole number from 1 to 1024, got 0"):
        inputs_of(processor, [{"role": "user", "content": [{"type": "video", "video": video}]}], num_frames=0)


# Texts with placeholders ----------------------------------------------------------------------------------------------


def test_call_with_text_and_pictures_is_the_template(processor, reference):
    text = processor.apply_chat_template(user(PICTURE, OTHER, "Which is closer?"), add_generation_prompt=True)
    for images, texts in (([PICTURE, OTHER], text), ([[PICTURE, OTHER]], [text]), ([[PICTURE, OTHER]], text)):
        assert_same(processor(images=images, text=texts), reference)


def test_call_with_a_batch_of_texts(processor):
    conversations = [user(PICTURE, OTHER, "Which?"), user("Hello"), user(OTHER, "What is this, and why?")]
    texts = processor.apply_chat_template(conversations)
    kwargs = {"padding": True, "padding_side": "left"}
    batch = processor(images=[[PICTURE, OTHER], [], [OTHER]], text=texts, **kwargs)
    assert_same(batch, inputs_of(processor, conversations))
    words = (
        "`images` must have one list of pictures for each of the 3 texts, got 2. Give an empty list for a text without"
    )
    with pytest.raises(ValueError, match=words):
        processor(images=[[PICTURE, OTHER], [OTHER]], text=texts, **kwargs)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_flat_list_is_dealt_out_by_placeholders(name):
    processor = make(name)
    conversations = [user(PICTURE, OTHER, "Which?"), user(OTHER, "What is this, and why?")]
    texts = processor.apply_chat_template(conversations)
    kwargs = {"padding": True, "padding_side": "left"}
    reference = processor(images=[[PICTURE, OTHER], [OTHER]], text=texts, **kwargs)
    assert_same(processor(images=[PICTURE, OTHER, OTHER], text=texts, **kwargs), reference)
    assert reference["views_per_scene"].tolist() == [2, 1]
    with pytest.raises(ValueError, match=r"as many pictures as the texts have placeholders \(2 \+ 1\), got 2 pictures"):
        processor(images=[PICTURE, OTHER], text=texts, **kwargs)


def test_call_with_arrays_of_several_pictures(processor):
    pictures = [noise(60, 60, seed) for seed in range(3)]
    texts = processor.apply_chat_template([user(*pictures[:2], "Which?"), user(pictures[2], "What is this?")])
    kwargs = {"padding": True, "padding_side": "left"}
    reference = processor(images=[pictures[:2], pictures[2:]], text=texts, **kwargs)
    arrays = np.stack([np.array(picture) for picture in pictures])
    for images in (arrays, [arrays[:2], arrays[2:]], [[arrays[:2]], [arrays[2]]], [arrays[:2], [pictures[2]]]):
        assert_same(processor(images=images, text=texts, **kwargs), reference)
    assert_same(processor(images=arrays[:2], text=texts[0]), processor(images=pictures[:2], text=texts[0]))
    conversation = user(PICTURE, "Which?")
    conversation[0]["content"][0] = {"type": "image", "image": arrays}
    assert_same(inputs_of(processor, conversation), inputs_of(processor, user(*pictures, "Which?")))
    with pytest.raises(ValueError, match="`images` must hold either pictures or lists of pictures, got both"):
        processor(images=[arrays[:2], pictures[2]], text=texts, **kwargs)


def test_call_with_text_only(processor):
    for texts in ("Hello", ["Hello"], ["Hello", "there"]):
        inputs = processor(text=texts, padding=True)
        count = 1 if isinstance(texts, str) else len(texts)
        assert inputs["views_per_scene"].tolist() == [0] * count and len(inputs["input_ids"]) == count


def test_call_with_one_picture(processor):
    text = processor.apply_chat_template(user(PICTURE, "Which?"))
    assert_same(processor(images=PICTURE, text=text), inputs_of(processor, user(PICTURE, "Which?")))


# Loading and saving ---------------------------------------------------------------------------------------------------


def same_settings(ours: Spa3VLMProcessor, reference: Spa3VLMProcessor) -> bool:
    return type(ours) is Spa3VLMProcessor and ours.to_dict() == reference.to_dict()


def test_save_and_load(tmp_path, monkeypatch):
    processor = make(image_mode="native", num_frames=6)
    processor.view_image_processor.mode = "pad"
    processor.save_pretrained(tmp_path)
    conversation = user(PICTURE, OTHER, "Which is closer?")
    reference = inputs_of(processor, conversation)
    for loaded in (Spa3VLMProcessor.from_pretrained(tmp_path), Spa3VLMProcessor.from_pretrained(str(tmp_path))):
        assert same_settings(loaded, processor) and loaded.view_image_processor.mode == "pad"
        assert_same(inputs_of(loaded, conversation), reference)
        assert loaded.chat_template == processor.chat_template
    other = Spa3VLMProcessor.from_pretrained(tmp_path, image_mode="aligned", num_frames=2)
    assert (other.image_mode, other.num_frames, other.image_token_id) == ("aligned", 2, processor.image_token_id)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("Hello <|im_end|>").input_ids == processor.tokenizer("Hello <|im_end|>").input_ids
    assert repr(processor).startswith("Spa3VLMProcessor(image_mode='native', num_frames=6,")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A VLM's and a Spa3R's folder, as one would have downloaded them."""
    root = tmp_path_factory.mktemp("parts")
    vlm, vlm_processor = build("qwen2_5_vl")
    for part in (vlm, vlm_processor):
        part.save_pretrained(root / "vlm")
    spa3r = Spa3RModel(spa3r_config(backbone_config=vggt_config(patch_size=14, image_size=70)))
    for part in (spa3r, Spa3RImageProcessor(size=SIZE, mode="pad")):
        part.save_pretrained(root / "spa3r")
    return root / "vlm", root / "spa3r"


def test_from_the_folders_of_vlm_and_spa3r(folders, tmp_path):
    vlm, spa3r = folders
    processor = Spa3VLMProcessor.from_vlm_and_spa3r(vlm, spa3r, num_frames=5)
    assert processor.image_token_id == make().image_token_id and processor.num_frames == 5
    assert (processor.view_image_processor.size, processor.view_image_processor.mode) == (SIZE, "pad")
    assert Spa3VLMProcessor.from_vlm_and_spa3r(str(vlm)).view_image_processor.size == 518

    model = Spa3VLMForConditionalGeneration.from_vlm_and_spa3r(vlm, str(spa3r))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert same_settings(loaded, processor)
    inputs = inputs_of(loaded, user(PICTURE, "Which?"), add_generation_prompt=True)
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 2


def test_auto_processor_without_a_model_beside(tmp_path):
    processor = make()
    processor.save_pretrained(tmp_path)
    assert same_settings(AutoProcessor.from_pretrained(tmp_path), processor)


@pytest.mark.parametrize("what", ["nothing", "vlm"])
def test_a_folder_without_our_processor_is_refused(what, tmp_path):
    if what == "vlm":
        build_processor("qwen2_5_vl").save_pretrained(tmp_path)
    words = r"holds no Spa3VLMProcessor \(processor_config.json is missing or another class's\). Make one with Spa3VLMP"
    with pytest.raises(ValueError, match=words):
        Spa3VLMProcessor.from_pretrained(tmp_path)


def test_what_the_vlm_sees_is_checked():
    with pytest.raises(ValueError, match="`image_mode` must be 'aligned' or 'native', got 'both'"):
        make(image_mode="both")


def test_a_view_is_cut_to_whole_tokens_where_the_processor_holds_their_size():
    """Pixtral's processor knows how patches are merged, its image processor doesn't."""
    processor = make("pixtral")
    processor.vlm_processor.patch_size, processor.vlm_processor.spatial_merge_size = 14, 2
    view = noise(70, 56)
    assert processor.vlm_picture(view, view).size == (56, 56)


def test_placeholders_make_text_and_pictures_follow(processor, reference):
    """The two steps of model cards: the prompt first, then prompt and pictures."""
    message = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which is closer?"}],
    }
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    assert prompt == processor.vlm_processor.apply_chat_template([message], add_generation_prompt=True)
    assert_same(processor(text=prompt, images=[PICTURE, OTHER]), reference)
    with pytest.raises(ValueError, match=r"Or make the text first \(tokenize=False\) and pass pictures to processor\("):
        inputs_of(processor, [message])


def test_keywords_of_the_vlms_processor_reach_it(tmp_path):
    make().save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path, max_pixels=28 * 28 * 4, image_mode="native")
    assert again.image_mode == "native"
    assert again.image_processor.size["longest_edge"] == 28 * 28 * 4


@pytest.mark.parametrize(
    ("name", "meant"),
    [("num_frame", "num_frames"), ("image_modes", "image_mode"), ("image_token_ids", "image_token_id")],
)
def test_keywords_that_were_meant_for_us_do_not_go_to_the_vlms_processor(name, meant, tmp_path):
    make().save_pretrained(tmp_path)
    for load in (Spa3VLMProcessor.from_pretrained, AutoProcessor.from_pretrained):
        with pytest.raises(TypeError, match=f"`{name}` is no argument of Spa3VLMProcessor: did you mean `{meant}`"):
            load(tmp_path, **{name: 3})


@pytest.mark.parametrize("tokenize", [True, False])
def test_keywords_for_the_vlms_processor_that_nothing_takes(processor, tokenize):
    for given, words in (
        (
            {"foo": 1},
            r"Neither Spa3VLMProcessor nor Qwen2_5_VLProcessor takes 'foo'\. Leave it out, or correct",
        ),
        ({"images_kwargs": {"sise": 3}}, r"takes \"images_kwargs\['sise'\]\""),
        ([1], r"`processor_kwargs` must be a dictionary of keywords, got \[1\]"),
        ("padding", "`processor_kwargs` must be a dictionary of keywords, got 'padding'"),
    ):
        with pytest.raises(ValueError, match=words):
            processor.apply_chat_template(user("Hi"), tokenize=tokenize, processor_kwargs=given)


def test_lists_have_their_tokens_counted_too(processor):
    prompts = [processor.apply_chat_template(user(PICTURE, "A?")), processor.apply_chat_template(user("What now?"))]
    lists = processor(text=prompts, images=[[PICTURE], []], return_tensors=None)
    tensors = processor(text=prompts, images=[[PICTURE], []], padding=True)
    assert lists["image_tokens_per_scene"] == tensors["image_tokens_per_scene"].tolist()


# Words that are tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_no_token_of_a_family_is_taken_as_words(name):
    """Every special token of the tokenizer and every placeholder that the processor replaces, in every place."""
    processor = make(name)
    family = FAMILIES[name]
    named = {*family.tokens.values(), *family.more_tokens}
    named |= {getattr(processor.vlm_processor, f"{kind}_token", None) for kind in ("image", "video", "audio")} - {None}
    assert named <= processor.reserved_tokens
    for token in named:
        for role, content in (
            ("user", f"What is {token}?"),
            ("assistant", [{"type": "text", "text": token}]),
            ("system", [{"type": "text", "text": token[:2]}, {"type": "text", "text": token[2:]}]),
            ("user", [{"type": "text", "text": f"{token[:2]} "}, {"type": "text", "text": f" {token[2:]}"}]),
            (f"user{token}", "Hi"),
        ):
            messages = [{"role": "user", "content": "Hi"}, {"role": role, "content": content}]
            for conversation in (messages, [messages[:1], messages]):
                with pytest.raises(
                    ValueError, match=r"The text of message 1 .* must not contain '.*Write it otherwise"
                ):
                    processor.apply_chat_template(conversation, tokenize=True)
    processor.check_messages(user(PICTURE, "What do < s>, <b>, the image_token, [1] and A || B mean?"))


def test_a_message_of_another_form_is_refused(processor):
    hi = {"role": "user", "content": "Hi"}
    for conversation, words in (
        (hi, "must be a list of messages, .* got a dict"),
        ("Hi", "must be a list of messages, .* got 'Hi'"),
        ([hi, "Hi"], "Message 1 must be .* got 'Hi'"),
        ([hi | {"role": None}], "Message 0 must have a role such as 'user', got None"),
        ([hi | {"content": None}], r"content of message 0 \('user'\) must be a text or a list of items, got None"),
        ([hi | {"content": 2}], "must be a text or a list of items, got 2"),
        ([hi | {"content": {"type": "text", "text": "Hi"}}], "got one item. Put it into a list"),
        ([hi | {"content": ["x" * 10**6]}], r'such as \{"type": "text", "text": ...\}, got the text .x{40}.\.{4} Give'),
        ([hi | {"content": [7]}], "must be a dictionary, got 7"),
        ([hi | {"content": []}], r"content of message 0 \('user'\) must hold at least one item, got none. Leave the"),
        ([hi | {"content": ""}, {"role": "user"}], "message 1 .* must be a text or a list of items, got None"),
        ([hi | {"content": [None]}], "must be a dictionary, got None"),
        ([hi | {"content": [[]]}], "must be a dictionary, got a list"),
        ([hi, None], "Message 1 must be .* got None"),
        ([hi, 3], "Message 1 must be .* got 3"),
        ([{"content": "Hi"}], "Message 0 must have a role such as 'user', got None"),
        ([hi | {"role": 3}], "Message 0 must have a role such as 'user', got 3"),
        ([], "must hold at least one message, .* got none"),
        (None, "must be a list of messages, .* got None"),
        (b"x", "must be a list of messages, .* got a bytes"),
        ([hi | {"content": [{"type": "text"}]}], "must have a text under 'text', got None"),
        ([hi | {"content": [{"type": "text", "text": 2}]}], "must have a text under 'text', got 2"),
    ):
        for tokenize in (True, False):
            with pytest.raises(ValueError, match=words):
                processor.apply_chat_template(conversation, tokenize=tokenize)


def test_the_place_of_appended_tokens_is_no_word(processor):
    appending = make(spatial_tokens=4, spatial_token="<|vision_start|>")
    assert "<|vision_start|>" in appending.reserved_tokens
    with pytest.raises(ValueError, match="must not contain"):
        appending.apply_chat_template(user(PICTURE, "<|vision_start|>"))


# Videos in every form -------------------------------------------------------------------------------------------------

VIDEO_PLACE = "<|vision_start|><|video_pad|><|vision_end|>"


def about(*parts) -> list[dict]:
    """A conversation of one user's message: pictures, words, and videos as items."""
    kinds = [part if isinstance(part, dict) else user(part)[0]["content"][0] for part in parts]
    return [{"role": "user", "content": kinds}]


def video_text(processor, *parts) -> str:
    """The same as a text, with Qwen's place for a video."""
    place = {"type": "text", "text": VIDEO_PLACE}
    bare = {"image": {"type": "image"}, "video": place}
    items = [bare.get(item["type"], item) for item in about(*parts)[0]["content"]]
    return processor.vlm_processor.apply_chat_template([{"role": "user", "content": items}])


FRAMES = counting_frames(6)
VIDEO_FORMS = {
    "frames": FRAMES,
    "list": [FRAMES],
    "nested": [[FRAMES]],
    "array": np.stack([np.array(frame) for frame in FRAMES]),
    "list_of_arrays": [np.stack([np.array(frame) for frame in FRAMES])],
    "batch": np.stack([np.array(frame) for frame in FRAMES])[None],
    "tensors": [torch.from_numpy(np.stack([np.array(frame) for frame in FRAMES])).permute(0, 3, 1, 2)],
    "with_metadata": [(np.stack([np.array(frame) for frame in FRAMES]), {"fps": 2.0})],
}


@pytest.mark.parametrize("form", VIDEO_FORMS)
def test_the_videos_keyword_is_the_message(processor, form):
    text = video_text(processor, {"type": "video"}, "What?")
    assert VIDEO_PLACE in text
    reference = inputs_of(processor, about({"type": "video", "video": FRAMES}, "What?"))
    assert reference["views_per_scene"].tolist() == [6]
    assert_same(processor(text=[text], images=None, videos=VIDEO_FORMS[form], padding=True), reference)
    assert_same(processor(None, text, VIDEO_FORMS[form]), reference)
    written = processor.apply_chat_template(about({"type": "video", "video": FRAMES}, "What?"))
    assert_same(processor(text=written, videos=VIDEO_FORMS[form]), reference)


def test_pictures_beside_videos_keep_their_order(processor):
    before, after, clip = {"type": "image", "image": PICTURE}, {"type": "image", "image": OTHER}, FRAMES[:2]
    parts = (before, {"type": "video", "video": clip}, "Then", {"type": "video", "video": FRAMES[2:]}, after, "What?")
    reference = inputs_of(processor, about(*parts))
    text = video_text(processor, *parts)
    assert_same(processor(images=[PICTURE, OTHER], text=text, videos=[clip, FRAMES[2:]]), reference)
    texts = [text, video_text(processor, "Hi"), video_text(processor, {"type": "video"}, "And?")]
    ours = processor(images=[[PICTURE, OTHER], [], []], text=texts, videos=[clip, FRAMES[2:], clip], padding=True)
    assert ours["views_per_scene"].tolist() == [8, 0, 2]


def test_options_of_a_call_with_videos(processor, tmp_path):
    video = str(counting_video(tmp_path / "video.mp4", 20))
    text = video_text(processor, {"type": "video"}, "What?")
    for kwargs, count in (
        ({}, 5),
        ({"num_frames": 3}, 3),
        ({"fps": 1}, 10),
        ({"videos_kwargs": {"fps": 1.0}}, 10),
        ({"videos_kwargs": {"num_frames": 2, "do_sample_frames": True}}, 2),
    ):
        assert processor(text=text, videos=[video], **kwargs)["views_per_scene"].tolist() == [count]
        talk = about({"type": "video", "video": video}, "What?")
        assert inputs_of(processor, talk, processor_kwargs=kwargs)["views_per_scene"].tolist() == [count]
        if "videos_kwargs" not in kwargs:
            assert inputs_of(processor, talk, **kwargs)["views_per_scene"].tolist() == [count]
    sampled = make(num_frames=2)  # qwen-vl-utils has sampled them
    ours = sampled(text=text, videos=[FRAMES], do_sample_frames=False, fps=[2.0])
    assert ours["views_per_scene"].tolist() == [6]
    assert sampled(text=text, videos=[FRAMES])["views_per_scene"].tolist() == [2]


def test_options_that_a_call_would_not_use_are_refused(processor, tmp_path):
    video = str(counting_video(tmp_path / "video.mp4", 20))
    text, talk = video_text(processor, {"type": "video"}, "What?"), about({"type": "video", "video": video}, "What?")
    words = "`do_sample_frames=False` must come with lists of frames, which are taken whole, got the video .*video.mp4"
    for call in (
        lambda: processor(text=text, videos=[video], do_sample_frames=False),
        lambda: inputs_of(processor, talk, do_sample_frames=False),
        lambda: inputs_of(processor, talk, processor_kwargs={"videos_kwargs": {"do_sample_frames": False}}),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    for name in ("video_start", "video_end", "nframes", "min_frames", "max_frames", "video_fps", "video_load_backend"):
        with pytest.raises(ValueError, match=f"must be `num_frames` or `fps`, got `{name}`"):
            inputs_of(processor, talk, **{name: 1})


@pytest.mark.parametrize(
    ("text", "arguments", "words"),
    [
        ("?", {"videos": [FRAMES]}, "must have as many places for videos, .*, as there are `videos`, 1, got 0"),
        (f"{VIDEO_PLACE}?", {}, "as there are `videos`, 0, got 1"),
        (f"{VIDEO_PLACE * 2}?", {"videos": [FRAMES]}, "as there are `videos`, 1, got 2"),
        ("<|video_pad|>?", {"videos": [FRAMES]}, "got 0 of them, 1 video tokens"),
        (f"{IMAGE_TOKEN * 3}?", {"videos": [FRAMES]}, "got 0 of them, 0 video tokens and 3 picture tokens"),
        (f"{VIDEO_PLACE}?", {"videos": [FRAMES], "images": [PICTURE]}, "a place for each of its pictures, 1, got 0"),
        (
            f"{VIDEO_PLACE}?",
            {"videos": [FRAMES], "fps": 1},
            "`fps` can't be used for a video given as a list of frames",
        ),
        (
            f"{VIDEO_PLACE}?",
            {"videos": [FRAMES], "fps": 1, "num_frames": 2},
            "`fps` and `num_frames` must not be given",
        ),
        (
            f"{VIDEO_PLACE}?",
            {"videos": [FRAMES], "videos_kwargs": {"size": 3}},
            "`videos_kwargs` must be of num_frames,",
        ),
        ("?", {"audio": [0.0]}, "`audio` must be None: a Spa3-VLM sees pictures and videos"),
        ("?", {"pading": True}, "Neither Spa3VLMProcessor nor Qwen2_5_VLProcessor takes 'pading'. Leave it out, or"),
        ("?", {"text_kwargs": {"paddin": True}}, r"takes \"text_kwargs\['paddin'\]\""),
        ("?", {"images_kwargs": 3}, "`images_kwargs` must be a dictionary of keywords, got 3"),
    ],
)
def test_calls_that_do_not_go_together_are_refused(processor, text, arguments, words):
    with pytest.raises(ValueError, match=words):
        processor(text=text, **arguments)


def test_typed_keywords_as_in_transformers(processor):
    texts = [processor.apply_chat_template(user(PICTURE, words)) for words in ("What is this?", "And?")]
    reference = processor(images=[PICTURE, PICTURE], text=texts, padding=True, padding_side="left")
    nested = {"text_kwargs": {"padding": True, "padding_side": "left"}, "images_kwargs": {"do_resize": True}}
    assert_same(processor([PICTURE, PICTURE], texts, **nested), reference)
    with pytest.raises(ValueError, match="takes 'paddings'"):
        inputs_of(processor, user(PICTURE, "?"), processor_kwargs={"paddings": True})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"nframes": 3}, [0, 9, 19]),
        ({"num_frames": 2}, [0, 19]),
        ({"fps": 1.0}, np.linspace(0, 19, 10).astype(int)),
        ({"fps": 2.0, "max_frames": 4}, [0, 6, 12, 19]),
        ({"video_start": 2.0, "video_end": 4.0, "nframes": 2}, [4, 8]),
        ({"video_start": 2.0}, [4, 19]),  # how many, the call says
        ({"nframes": None, "fps": None}, [0, 19]),
    ],
)
def test_what_a_message_says_of_its_video_is_done(processor, tmp_path, options, expected):
    """As qwen-vl-utils and transformers do."""
    item = {"type": "video", "video": str(counting_video(tmp_path / "video.mp4", 20))} | options
    inputs = inputs_of(processor, about(item, "?"), num_frames=2)
    views = processor.view_image_processor.unpack(inputs["view_pixel_values"], inputs["view_grid_hw"])
    assert [read_number(Image.fromarray(view)) for view in views] == list(expected)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"max_pixels": 360 * 420}, "A video's 'max_pixels' can't be used: frames are pictures of the size of the"),
        ({"sample_fps": 2, "total_pixels": 3}, "A video's 'sample_fps', 'total_pixels' can't be used"),
        ({"nframes": 2, "fps": 1}, "`num_frames` .* must be given without `fps`"),
        ({"nframes": 2, "num_frames": 2}, "must have `nframes` or `num_frames`, got both"),
        ({"nframes": 10**9}, "`num_frames` must be a whole number from 1 to 1024, got 1000000000"),
        ({"video_start": 5, "video_end": 1}, "`video_start` must be less than `video_end`"),
        ({"video": FRAMES, "fps": 2}, "`fps` can't be used for a video given as a list of frames, which have no times"),
        ({"video": FRAMES, "video_end": 2}, "`video_end` can't be used for a video given as a list of frames"),
        (
            {"video": np.zeros((60, 80, 3), np.uint8)},
            "A video must be a file, .* got an array of shape .*single picture",
        ),
        ({"video": {"bytes": b""}}, "A video must be a file, a URL, bytes, a list of frames or an array"),
    ],
)
def test_what_a_message_can_not_say_of_its_video_is_refused(processor, tmp_path, item, words):
    item = {"type": "video", "video": str(counting_video(tmp_path / "video.mp4", 20))} | item
    with pytest.raises(ValueError, match=words):
        inputs_of(processor, about(item, "?"))


def test_frames_that_differ_most_are_chosen_everywhere(tmp_path):
    """In a video file, a list of frames, a call and a message; saved with the processor; refused if unknown."""
    places = [0] * 9 + [6, 12]
    frames = [counting_frames(13)[place] for place in places]
    video = write_video(tmp_path / "video.mp4", frames)
    processor = make(num_frames=3, frames="coverage")
    processor.save_pretrained(tmp_path / "saved")
    loaded = Spa3VLMProcessor.from_pretrained(tmp_path / "saved")
    assert loaded.frames == "coverage" and make().frames == "uniform"
    assert Spa3VLMProcessor.from_pretrained(tmp_path / "saved", frames="uniform").frames == "uniform"
    assert processor_fingerprint(processor) != processor_fingerprint(make(num_frames=3))
    for media in (str(video), frames):
        for options in ({}, {"num_frames": 3}):
            item = {"type": "video", "video": media, **options}
            inputs = inputs_of(loaded, [{"role": "user", "content": [item]}])
            pictures = [{"type": "image", "image": frames[index]} for index in (0, 9, 10)]
            wanted = inputs_of(make(), [{"role": "user", "content": pictures}])["view_pixel_values"]
            assert (inputs["view_pixel_values"] - wanted).abs().max() < 0.2  # of neighboring gray levels: 0.3 and more
    with pytest.raises(ValueError, match="`frames` must be one of 'uniform', 'coverage', got 'all'"):
        make(frames="all")
