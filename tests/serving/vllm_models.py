"""Tiny Spa3-VLMs that the CPU kernels of vLLM can run: heads have 32 channels."""

from media import noise
from tiny import alive
from tiny_spa3_vlm import PICTURES, SIZE, Composed, make_spa3r
from vlm_families import build

from spa3r import Spa3RImageProcessor, Spa3VLM, Spa3VLMProcessor
from spa3r.serving.vllm import GRID_FAMILIES, LIST_FAMILIES

SERVED = (*GRID_FAMILIES, *LIST_FAMILIES)


def compose(family: str) -> Composed:
    fields: dict = {"num_attention_heads": 2, "num_key_value_heads": 1}
    if family in GRID_FAMILIES:
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    if family == "qwen3_vl":
        fields["head_dim"] = 32
    vlm, vlm_processor = build(family, **fields)
    model = Spa3VLM.from_vlm_and_spa3r(vlm, make_spa3r())
    alive(model.adapter)
    views = Spa3RImageProcessor(size=SIZE)
    return Composed(model, Spa3VLMProcessor(vlm_processor, views, image_token_id=vlm.config.image_token_id))


def pictures(family: str) -> list:
    """Three pictures of a scene; of one size for families that need that."""
    return PICTURES if family in GRID_FAMILIES else [noise(60, 40, seed) for seed in range(3)]
