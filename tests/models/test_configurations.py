"""Configurations check themselves: types, ranges, sizes that no machine can build; wherever they come from."""

import json
import math

import numpy as np
import pytest
import torch
from tiny import spa3r_config, vggt_config
from transformers import AutoConfig
from vlm_families import build

from spa3r import Spa3RConfig, Spa3RImageProcessor, Spa3RModel, Spa3VLM, Spa3VLMConfig, VggtConfig, VggtModel

CLASSES = {"vggt": VggtConfig, "spa3r": Spa3RConfig, "spa3_vlm": Spa3VLMConfig}

COUNTS = {
    "vggt": (
        *("patch_size", "image_size", "hidden_size", "num_attention_heads", "num_hidden_layers"),
        *("patch_embedding_num_layers", "patch_embedding_num_heads", "camera_num_layers", "camera_num_heads"),
        *("camera_num_iterations", "dpt_features"),
    ),
    "spa3r": (
        *("semantic_hidden_size", "hidden_size", "num_attention_heads", "num_encoder_layers", "num_decoder_layers"),
        "num_latents",
    ),
    "spa3_vlm": ("adapter_num_attention_heads",),
}
NUMBERS = {
    "vggt": {
        "mlp_ratio": (0, -1),
        "rope_theta": (0, -100.0),
        "layer_scale_init": (-1,),
        "initializer_range": (-0.1, 2),
    },
    "spa3r": {
        **{"mlp_ratio": (0, -4), "rope_theta": (0, -1), "layer_norm_eps": (0, -1e-6), "initializer_range": (-0.1, 2)},
        "mask_ratio": (1, -0.1),
    },
    "spa3_vlm": {"initializer_range": (-0.1, 2)},
}


@pytest.mark.parametrize(("kind", "field"), [(kind, field) for kind, fields in COUNTS.items() for field in fields])
def test_counts_are_whole_numbers_in_a_range(kind, field):
    for value in (0, -1, 1.5, 4.0, True, "4", math.nan, math.inf, 10**9, [4], {}, torch.tensor(4)):
        with pytest.raises(ValueError, match=rf"^`{field}` of \w+ must be a whole number from \d+ to \d+.*, got "):
            CLASSES[kind](**{field: value})


@pytest.mark.parametrize(
    ("kind", "field", "wrong"), [(kind, *item) for kind, fields in NUMBERS.items() for item in fields.items()]
)
def test_numbers_are_finite_and_in_a_range(kind, field, wrong):
    for value in (*wrong, math.nan, math.inf, -math.inf, True, "0.5", None, [0.5], {}):
        with pytest.raises(ValueError, match=rf"^`{field}`.* must be .*, got "):
            CLASSES[kind](**{field: value})


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("vggt", {"num_register_tokens": -1}, "must be a whole number from 0 to 1024, got -1"),
        ("vggt", {"num_hidden_layers": 10**6}, "`num_hidden_layers` .* from 1 to 512, got 1000000"),
        ("vggt", {"image_size": 519}, "`image_size` must be a multiple of `patch_size` = 14, got 519"),
        ("vggt", {"global_qk_norm": "none"}, "must be one of 'layer_norm', 'rms_norm', got 'none'"),
        ("vggt", {"dpt_layers": [-1, 0, 1, 1]}, r"must be below `num_hidden_layers` = 24, got \[-1, 0, 1, 1\]"),
        ("vggt", {"dpt_layers": 4}, "must be a list of which each entry is a whole number, got 4"),
        ("vggt", {"dpt_layers": [0, 1, 2, True]}, r"each entry is a whole number, got \[0, 1, 2, True\]"),
        ("vggt", {"dpt_channels": [6, 8, 8, 8]}, r"`dpt_channels` must be multiples of 4 .* got \[6, 8, 8, 8\]"),
        ("vggt", {"dpt_channels": [0, 8, 8, 8]}, r"`dpt_channels` must be multiples of 4 from 4 .* got \[0, 8, 8, 8\]"),
        ("vggt", {"dpt_features": 12}, "`dpt_features` must be a multiple of 8 .* got 12"),
        ("vggt", {"heads": "camera"}, "`heads` .* must be a list of which each entry is a text, got 'camera'"),
        ("vggt", {"hidden_size": 16384, "num_hidden_layers": 512}, r"at most 20 billion parameters, got about \d+"),
        ("vggt", {"dtype": "float33"}, "`dtype` of VggtConfig must be a torch.dtype, .*, got 'float33'"),
        ("vggt", {"id2label": 5}, "`id2label` of VggtConfig must be a dictionary or None, got 5"),
        ("vggt", {"architectures": "VggtModel"}, "`architectures` .* must be a list of texts or None"),
        ("spa3r", {"num_latents": 0}, "`num_latents` of Spa3RConfig must be a whole number from 1 to 65536, got 0"),
        ("spa3r", {"hidden_size": 16384, "num_attention_heads": 16, "num_encoder_layers": 512}, "at most 20 billion"),
        ("spa3r", {"targets": ["colour"]}, "`targets` .* each entry is one of 'geometry', 'semantic', got "),
        ("spa3r", {"backbone_config": {"hidden_size": 0}}, "`backbone_config`: `hidden_size` of VggtConfig must be"),
        (
            "spa3r",
            {"backbone_config": {"model_type": "vit"}},
            "the configuration of a geometry backbone .* type 'vit'",
        ),
        (
            "spa3r",
            {"backbone_config": Spa3RConfig()},
            "the configuration of a geometry backbone .* 'spa3r'",
        ),
        (
            "spa3r",
            {"backbone_config": {1: 2}},
            "`backbone_config` of Spa3RConfig must be a dictionary or .*, got {1: 2}",
        ),
        ("spa3r", {"backbone_config": 3}, "`backbone_config` of Spa3RConfig must be a dictionary or .*, got 3"),
        ("spa3r", {"semantic_teacher_config": {"hidden_size": 0}}, "`semantic_teacher_config.hidden_size` must be"),
        ("spa3r", {"semantic_teacher_config": {"model_type": "dino9"}}, "that this version .* knows .*, got 'dino9'"),
        ("spa3_vlm", {"vlm_config": {"model_type": "qwen9"}}, "`vlm_config` must name a family .*, got 'qwen9'"),
        ("spa3_vlm", {"vlm_config": {"model_type": 9}}, "`vlm_config` must name a family .*, got 9"),
        (
            "spa3_vlm",
            {"vlm_config": {"model_type": "qwen2_5_vl", "text_config": {"hidden_size": 10**9}}},
            "`vlm_config.text_config.hidden_size` must be a whole number from 1 to 1048576, got 1000000000",
        ),
        (
            "spa3_vlm",
            {"vlm_config": {"model_type": "qwen2_5_vl", "text_config": {"num_hidden_layers": 10**6}}},
            "`vlm_config.text_config.num_hidden_layers` must be a whole number from 1 to 512, got 1000000",
        ),
        (
            "spa3_vlm",
            {"vlm_config": {"model_type": "qwen2_5_vl", "text_config": {"hidden_size": 10**6, "vocab_size": 10**6}}},
            "in `vlm_config.text_config` must make a stack of at most 200 billion .* 80 layers of width 1000000 ",
        ),
        (
            "spa3_vlm",
            {"vlm_config": {"model_type": "qwen2_5_vl", "vision_config": {"in_channels": 10**9}}},
            "`vlm_config.vision_config.in_channels` must be a whole number from 1 to 4096, got 1000000000",
        ),
        (
            "spa3_vlm",
            {"vlm_config": {"model_type": "qwen2_5_vl", "text_config": {"hidden_size": "64"}}},
            "`vlm_config` has a field that the family 'qwen2_5_vl' doesn't accept: .*'hidden_size' expected int",
        ),
        ("spa3_vlm", {"spa3r_config": {"backbone_config": {"rope_theta": 0}}}, "`rope_theta` of VggtConfig must be"),
        ("spa3_vlm", {"spatial_token_id": -1}, "`spatial_token_id` .* from 0 .*, got -1"),
        ("spa3_vlm", {"spatial_token_id": 10**9}, r"`spatial_token_id` must be below the VLM's vocabulary of \d+, got"),
        ("spa3_vlm", {"spatial_source": True}, "must be one of 'spa3r', 'backbone', 'none', got True"),
    ],
)
def test_wrong_fields_are_named(kind, fields, words):
    with pytest.raises(ValueError, match=words) as refused:
        CLASSES[kind](**fields)
    assert len(str(refused.value)) < 500


def test_a_field_is_checked_when_it_is_set_later():
    config = spa3r_config()
    with pytest.raises(
        ValueError, match="`num_latents` of Spa3RConfig must be a whole number from 1 to 65536, got '6'"
    ):
        config.num_latents = "6"
    assert config.num_latents == 6


def test_whole_numbers_where_fractions_may_stand():
    for config in (VggtConfig(layer_scale_init=1, mlp_ratio=2), Spa3RConfig(initializer_range=1, rope_theta=100)):
        assert type(config)(**config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_latents": "6"}, "`num_latents` of Spa3RConfig must be a whole number from 1 to 65536, got '6'"),
        ({"num_encoder_layers": 10**6}, "`num_encoder_layers` .* from 1 to 512, got 1000000"),
        ({"backbone_config": {"hidden_size": 10**9}}, "`backbone_config`: `hidden_size` of VggtConfig must be"),
        ({"backbone_config": []}, r"`backbone_config` of Spa3RConfig must be a dictionary or .*, got \[\]"),
        ({"semantic_teacher_config": "dinov3"}, "`semantic_teacher_config` of Spa3RConfig must be a dictionary or"),
        ({"mask_ratio": {}}, "`mask_ratio` of Spa3RConfig must be a number .*, got {}"),
        ({"dtype": 7}, "`dtype` of Spa3RConfig must be a torch.dtype"),
    ],
)
def test_a_saved_configuration_is_checked_before_a_model_is_built(change, words, tmp_path):
    Spa3RModel(spa3r_config()).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    for load in (Spa3RModel.from_pretrained, Spa3RConfig.from_pretrained, AutoConfig.from_pretrained):
        with pytest.raises(ValueError, match=words):
            load(tmp_path)


def test_what_is_used_today_is_in_range():
    for kind in ("spa3r", "spa3_vlm"):
        CLASSES[kind].from_pretrained(_embedded(kind))
    VggtModel(vggt_config(num_register_tokens=0, heads=[]))
    Spa3VLM(Spa3VLMConfig(vlm_config=build("qwen2_5_vl")[0].config, spa3r_config=spa3r_config(num_latents=1)))


def _embedded(kind: str):
    from spa3r.checkpoints import resolve

    return resolve("embedded", kind)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        *(
            ({"size": value}, "`size` must be a positive multiple of")
            for value in (True, 28.0, "518", None, 14 * 10**6)
        ),
        *(
            ({"patch_size": value}, "`patch_size` must be a whole number from 1 to 256, got")
            for value in (0, -14, 14.0, "14", True, None, 10**9)
        ),
        *(
            ({"image_std": value}, "`image_std` must hold three finite numbers above 0, one for each channel, got")
            for value in (0, None, "abc", [0, 1, 1], [math.nan, 1, 1], [1, 1], [1, 1, -1], [1, 1, True], [1, 1, "1"])
        ),
        *(
            ({"image_mean": value}, "`image_mean` must hold three finite numbers, one for each channel, got")
            for value in (0.5, None, [math.inf, 0, 0], [0.5] * 4, ["a", 0, 0], np.zeros((3, 3)))
        ),
        *(({"mode": value}, "`mode` must be 'crop', 'pad' or 'pretraining', got") for value in (None, 3, ["crop"])),
    ],
)
def test_settings_of_the_image_processor_are_checked_in_the_call_and_in_its_file(fields, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        Spa3RImageProcessor(**fields)
    try:
        content = json.dumps(Spa3RImageProcessor().to_dict() | fields)
    except TypeError:  # an array, which no file holds
        return
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        Spa3RImageProcessor.from_pretrained(tmp_path)


def test_channels_may_be_arrays():
    processor = Spa3RImageProcessor(image_mean=np.array([0.5, 0.4, 0.3]), image_std=torch.ones(3))
    assert processor.image_mean == [0.5, 0.4, 0.3] and processor.image_std == [1.0] * 3
