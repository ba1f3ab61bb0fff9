"""Model cards: the README.md that a saved checkpoint gets, with the metadata that the hub reads.

Cards written by users are never overwritten. The licenses are those that the hub states for the repositories; of
several, the card uses the strictest.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers.utils import logging

from spa3r.disk import write_whole

logger = logging.get_logger(__name__)

CARD = "README.md"

LICENSES = {
    "facebook/VGGT-1B": "cc-by-nc-4.0",
    "facebook/VGGT-1B-Commercial": "other",
    "depth-anything/DA3-SMALL": "apache-2.0",
    "depth-anything/DA3-BASE": "apache-2.0",
    "depth-anything/DA3-LARGE": "cc-by-nc-4.0",
    "depth-anything/DA3-GIANT": "cc-by-nc-4.0",
    "hustvl/Spa3-VLM": "cc-by-nc-4.0",
    "facebook/dinov3-vitl16-pretrain-lvd1689m": "other",
}
"""Licenses of the repositories whose weights a Spa3R usually contains."""

STRICTNESS = ("cc-by-nc-4.0", "other", "apache-2.0")
"""Strictest first: no commercial use at all, then custom terms, then any use."""

GENERATED = (
    None,
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
    "automatically generated.",
)
"""Descriptions in the templates that PEFT and transformers write if there is no card."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

_USE = {
    "Spa3VLMForConditionalGeneration": """\
from spa3r import Spa3VLM, Spa3VLMProcessor

model = Spa3VLM.from_pretrained("{name}")
processor = Spa3VLMProcessor.from_pretrained("{name}")
content = [{{"type": "image", "image": "photo.jpg"}}, {{"type": "text", "text": "How many chairs are in the room?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}], tokenize=True, return_dict=True, add_generation_prompt=True
)
print(processor.decode(model.generate(**inputs, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]))""",
    "Spa3RModel": """\
from spa3r import Spa3RImageProcessor, Spa3RModel

model = Spa3RModel.from_pretrained("{name}")
processor = Spa3RImageProcessor(
    size=model.config.backbone_config.image_size, patch_size=model.config.patch_size
)
latents = model.encode(**processor(["photo_1.jpg", "photo_2.jpg"]))  # (scenes, latents, width)""",
    "DepthAnything3Model": """\
from spa3r import DepthAnything3Model, Spa3RImageProcessor

model = DepthAnything3Model.from_pretrained("{name}")
processor = Spa3RImageProcessor(size=model.config.image_size, patch_size=model.config.patch_size)
cameras = model(**processor(["photo_1.jpg", "photo_2.jpg"]), output_cameras=True)""",
    "VggtModel": """\
from spa3r import Spa3RImageProcessor, VggtModel

model = VggtModel.from_pretrained("{name}")
processor = Spa3RImageProcessor(size=model.config.image_size, patch_size=model.config.patch_size)
cameras = model(**processor(["photo_1.jpg", "photo_2.jpg"]), output_cameras=True)""",
}


def parts_of(config: Any) -> list[str]:
    """Hub ids of the repositories whose weights a model contains, as recorded in its configuration."""
    names = []
    for field in ("vlm_config", "spa3r_config", "backbone_config", "semantic_teacher_config"):
        part = getattr(config, field, None)
        if part is not None:
            names += [getattr(config, field.replace("config", "name_or_path"), None), *parts_of(part)]
            names.append(getattr(part, "name_or_path", None))
    found = (str(name) for name in names if name)
    return list(dict.fromkeys(name for name in found if _HUB_ID.fullmatch(name) and not Path(name).exists()))


def license_of(names: Iterable[str]) -> str | None:
    """The strictest license of some repositories; None if it may be stricter than those that are known."""
    licenses = [LICENSES.get(name) for name in names]
    strictest = min((known for known in licenses if known is not None), key=STRICTNESS.index, default=None)
    return None if strictest == "apache-2.0" and None in licenses else strictest


def log_license(model: Any) -> None:
    """Warn, once for each repository, that a loaded model holds weights that may not be used commercially."""
    for name in dict.fromkeys([*parts_of(model.config), str(model.config.name_or_path)]):
        if LICENSES.get(name) == "cc-by-nc-4.0" and not Path(name).exists():
            logger.warning_once(f"The weights of {name} may not be used commercially (license: cc-by-nc-4.0).")


def model_card(model: Any, name: str = "path/or/hub-id", training_data: Iterable[str] = ()) -> ModelCard:
    """The model card of one of our models.

    Args:
        model: One of our models, or a PEFT model around one, whose folder holds only its adapters.
        name: Name for the loading example.
        training_data: Names of the training data; hub ids are added to the metadata.
    """
    adapters = hasattr(model, "get_base_model")
    model = model.get_base_model() if adapters else model
    model_class = type(model).__name__
    is_vlm = model_class == "Spa3VLMForConditionalGeneration"
    parts, training_data = parts_of(model.config), list(dict.fromkeys(training_data))
    source = str(model.config.name_or_path)
    if adapters and _HUB_ID.fullmatch(source) and not Path(source).exists():
        parts.insert(0, source)
    license_id = license_of([*parts, source] if source in LICENSES else parts)
    strict = next((part for part in [*parts, source] if LICENSES.get(part) == license_id), None)
    data = ModelCardData(
        library_name="spa3r",
        pipeline_tag="image-text-to-text" if is_vlm else "image-feature-extraction",
        base_model=parts or None,
        license=license_id,
        license_name="weights-of-the-base-models" if license_id == "other" else None,
        license_link=f"https://huggingface.co/{strict}" if license_id == "other" else None,
        datasets=[source for source in training_data if _HUB_ID.fullmatch(source)] or None,
        tags=["spa3r", "spatial-intelligence", *(["vision-language"] if is_vlm else [])],
    )
    shown = "Spa3VLM" if is_vlm else model_class
    about = {
        "Spa3VLM": "A vision-language model whose image tokens are fused with the latents of a Spa3R, which it encodes "
        "from the same unposed photos.",
        "VggtModel": "A geometry backbone: tokens, cameras, depth and points of unposed photos.",
        "DepthAnything3Model": "A geometry backbone: tokens, cameras and depth of photos, posed or not.",
    }.get(
        shown,
        "A Spa3R: it encodes unposed photos of a place into latents, and decodes the feature field of any camera.",
    )
    terms = {
        "cc-by-nc-4.0": "It contains weights that may not be used commercially.",
        "apache-2.0": "The license of the weights that it was made from allows any use.",
        "other": "It contains weights under terms of their own. Read those of the base models.",
        None: "The license of the weights is not known: state it. Weights of VGGT-1B may not be used commercially.",
    }[license_id]
    use = _USE.get(model_class, _USE["Spa3RModel"]).format(name=name)
    if (way := getattr(model, "quantization_method", None)) is not None:
        about += f" Weights are quantized: loading it needs {getattr(way, 'value', way)}."
    if adapters:
        about = f"Adapters (PEFT) for a {shown}, which the example loads from where they were trained. {about}"
    lines = [f"# {shown}", "", about, "", "## How to use", "", "```python", use, "```", ""]
    if training_data:
        lines += ["## Training data", "", *(f"- {source}" for source in training_data), ""]
    lines += ["## License", "", terms, ""]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines))


def source_names(sources: Any) -> list[str]:
    """Names of a configuration's sources for a card: hub ids unchanged, only the last part of paths.

    Args:
        sources: A list of texts and sections such as ``{"type": "folder", "root": "photos"}``, or one of them.
    """
    names = []
    if isinstance(sources, dict) and isinstance(sources.get("mixture"), dict):
        sources = list(sources["mixture"].values())
    for source in sources if isinstance(sources, list | tuple) else [sources]:
        fields = dict(source) if isinstance(source, dict) else {"path": source}
        place = next(
            (str(fields[key]) for key in ("annotations", "data", "dataset", "path", "root") if fields.get(key)), ""
        )
        if not _HUB_ID.fullmatch(place) or Path(place).exists():
            place = Path(place).name
        kind = str(fields.get("type", "")).replace("_", " ")
        names.append(place if _HUB_ID.fullmatch(place) else f"{kind} {place}".strip())
    return [name for name in names if name]


def is_own_card(file: str | os.PathLike) -> bool:
    """Whether a file is a card that a user wrote: it exists and is not an unedited template of transformers or PEFT."""
    file = Path(file)
    if not file.exists():
        return False
    lines = _written_lines(file.read_text(encoding="utf-8", errors="replace"))
    templates = (ModelCard.from_template(ModelCardData(), model_description=words) for words in GENERATED)
    return not any(lines == _written_lines(str(template)) for template in templates)


def _written_lines(text: str) -> list[str]:
    """The lines of a card without its metadata and what PEFT fills in: the base model and versions."""
    body = re.sub(r"\A---\n.*?\n---\n", "", text.replace("\r\n", "\n"), flags=re.DOTALL)
    lines = (line.strip() for line in body.partition("### Framework versions")[0].splitlines())
    return [line for line in lines if line and not line.startswith("- **Finetuned from model")]


def write_model_card(model: Any, folder: str | os.PathLike, training_data: Iterable[str] = ()) -> None:
    """Write the card of a saved model into its folder, unless the folder already has one.

    Args:
        model: The model.
        folder: The folder it was saved to.
        training_data: As in :func:`model_card`.
    """
    file = Path(folder) / CARD
    if not is_own_card(file):
        write_whole(file, str(model_card(model, training_data=training_data)))


__all__ = ["model_card", "write_model_card"]
