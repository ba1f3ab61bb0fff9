"""Any backbone under a Spa3R: pretraining, loading, old files, and combinations that don't fit."""

import json

import pytest
import torch
from tiny import (
    PATCH,
    SMALL,
    TARGETS,
    WIDE,
    alive,
    depth_anything_3_config,
    pretraining_config,
    relative_error,
    some_cameras,
    spa3r_config,
    vggt_config,
    view_inputs,
)
from torch import nn
from transformers import AutoConfig, AutoModel

from spa3r import DepthAnything3Model, Spa3RConfig, Spa3RForPreTraining, Spa3RModel, Spa3VLMConfig, VggtModel
from spa3r.models.backbone import BackbonePreTrainedModel
from spa3r.models.configuration_backbone import BackboneConfig
from spa3r.models.configuration_base import checked, count
from spa3r.models.packing import prepend_tokens
from spa3r.models.spa3r import modeling_spa3r

# A Depth Anything 3 of another width than the VGGT's
FIELDS = {"hidden_size": 24, "num_attention_heads": 2, "camera_encoder_num_heads": 2}


def depth_anything_3(**fields) -> DepthAnything3Model:
    return alive(DepthAnything3Model(depth_anything_3_config(**(FIELDS | fields))))


@checked
class PlainConfig(BackboneConfig):
    """The least that a backbone of one's own must have."""

    model_type = "plain_backbone"
    patch_size: int = count(PATCH)
    image_size: int = count(5 * PATCH)
    hidden_size: int = count(12)
    num_attention_heads: int = count(1)
    num_hidden_layers: int = count(2)
    heads: tuple[str, ...] | list[str] = ()
    initializer_range: float = 0.02

    @property
    def feature_size(self) -> int:
        return self.hidden_size

    @property
    def num_special_tokens(self) -> int:
        return 1


class PlainModel(BackbonePreTrainedModel):
    config_class = PlainConfig

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(nn.Linear(3 * config.patch_size**2, config.hidden_size) for _ in range(2))
        self.camera_head = self.depth_head = self.point_head = None
        self.post_init()

    def _aggregate(self, view_pixel_values, layout, layers, context_views):
        special = view_pixel_values.new_zeros(layout.num_views, 1, self.config.hidden_size)
        return {
            index: prepend_tokens(special, self.layers[index](view_pixel_values), layout.patches_per_view)
            for index in layers
        }


AutoConfig.register("plain_backbone", PlainConfig)
AutoModel.register(PlainConfig, PlainModel)


def pretraining_batch() -> dict:
    return view_inputs(targets=TARGETS)


@pytest.mark.parametrize("masking", ("asymmetric", "separate"))
def test_pretraining_on_depth_anything_3(masking, tmp_path):
    """From a folder, a step, saved with and without the backbone, loaded, the same loss."""
    depth_anything_3().save_pretrained(tmp_path / "backbone")
    model = Spa3RForPreTraining.from_backbone_and_dinov3(
        tmp_path / "backbone",
        targets=["geometry"],
        view_masking=masking,
        **{key: getattr(spa3r_config(), key) for key in ("hidden_size", "num_attention_heads", "num_latents")},
    )
    assert type(model.spa3r.backbone) is DepthAnything3Model and model.config.geometry_hidden_size == 48
    assert model.spa3r.encoder.input_projection.in_features == 48 == model.spa3r.geometry_head.fc2.out_features
    out = model.train()(**pretraining_batch())
    out.loss.backward()
    assert out.loss.isfinite() and out.losses.keys() == {"geometry_l1", "geometry_cosine", "depth_probe"}
    assert all(parameter.grad is None for parameter in model.spa3r.backbone.parameters())
    assert model.spa3r.encoder.query_tokens.grad.any()
    model.eval()
    with torch.no_grad():
        loss = model(**pretraining_batch()).loss
        for name, kept in (("whole", True), ("light", False)):
            model.save_pretrained(tmp_path / name, include_backbone=kept)
            loaded = Spa3RForPreTraining.from_pretrained(tmp_path / name)
            assert type(loaded.spa3r.backbone) is DepthAnything3Model
            assert relative_error(loaded(**pretraining_batch()).loss, loss) <= 1e-6


@torch.no_grad()
def test_targets_of_pretraining_leak_nothing_through_the_reference_view():
    model = alive(
        Spa3RForPreTraining(pretraining_config(backbone_config=depth_anything_3_config(), targets=["geometry"]))
    )
    mask = [False, False, False, True, True]
    inputs = view_inputs([[WIDE, SMALL, WIDE, WIDE, SMALL]]) | {"target_mask": mask}
    reference = model(**inputs)
    for seed in range(4):
        changed = inputs | {"view_pixel_values": inputs["view_pixel_values"].clone()}
        noise = torch.randn(19, 3 * PATCH**2, generator=torch.Generator().manual_seed(seed))
        changed["view_pixel_values"][-19:] = 5 * noise
        ours = model(**changed)
        assert torch.equal(ours.context_features, reference.context_features)
        assert torch.equal(ours.latents, reference.latents)


def test_a_backbone_of_ones_own_is_one_configuration_and_one_model(tmp_path):
    model = Spa3RForPreTraining(pretraining_config(backbone_config=PlainConfig(), targets=["geometry"]))
    assert type(model.spa3r.backbone) is PlainModel and model.config.geometry_hidden_size == 12
    inputs = pretraining_batch()
    out = model(**inputs, **some_cameras(inputs))
    assert out.loss.isfinite() and "depth_probe" not in out.losses
    model.save_pretrained(tmp_path)
    loaded = Spa3RModel.from_pretrained(tmp_path)
    assert type(loaded.config.backbone_config) is PlainConfig and type(loaded.backbone) is PlainModel
    with pytest.raises(ValueError, match=r"This PlainModel has no camera head .*don't request its output"):
        loaded(**view_inputs())


def test_files_of_before_load_as_before(tmp_path):
    """A backbone without ``model_type`` is a VGGT; a spatial source named after it is the backbone's."""
    model = alive(Spa3RModel(spa3r_config()))
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["backbone_config"].pop("model_type") == "vggt"
    (tmp_path / "config.json").write_text(json.dumps(fields))
    loaded = Spa3RModel.from_pretrained(tmp_path)
    assert type(loaded.backbone) is VggtModel
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
    assert Spa3RConfig(backbone_config={"hidden_size": 32, "num_attention_heads": 2}).geometry_hidden_size == 64
    config = Spa3VLMConfig(spa3r_config=spa3r_config(), spatial_source="backbone")
    config.save_pretrained(tmp_path / "vlm")
    file = tmp_path / "vlm" / "config.json"
    assert '"backbone"' in file.read_text()
    file.write_text(file.read_text().replace('"spatial_source": "backbone"', '"spatial_source": "vggt"'))
    for load in (Spa3VLMConfig, AutoConfig):
        assert load.from_pretrained(tmp_path / "vlm").spatial_source == "backbone"


# Combinations that don't fit ------------------------------------------------------------------------------------------

OTHERS = {
    "type": (
        depth_anything_3,
        r"a 'vggt' with features of width 32 and patches of 4 pixels, got .*'depth_any",
    ),
    "width": (
        lambda: VggtModel(vggt_config(hidden_size=32)),
        r"width 32 and patches of 4 .*of width 64 and patches",
    ),
    "patch": (lambda: VggtModel(vggt_config(patch_size=2, image_size=10)), r"patches of 4 pixels, got .* of 2 pixels"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_backbone_than_that_of_training_is_refused(other, tmp_path):
    make, words = OTHERS[other]
    VggtModel(vggt_config()).save_pretrained(tmp_path / "right")
    make().save_pretrained(tmp_path / "wrong")
    model = Spa3RModel(spa3r_config())
    model.config.backbone_name_or_path = str(tmp_path / "right")
    model.save_pretrained(tmp_path / "spa3r", include_backbone=False)
    Spa3RModel.from_pretrained(tmp_path / "spa3r")
    words = rf"must be the one that it was trained on, .*{words}.*Take that backbone, or pretrain a Spa3R on this one"
    with pytest.raises(ValueError, match=words):
        Spa3RModel.from_pretrained(tmp_path / "spa3r", backbone_name_or_path=str(tmp_path / "wrong"))
    model.backbone = make()
    with pytest.raises(ValueError, match=words):
        model.encode(**view_inputs())


def test_views_of_another_patch_size_are_refused():
    """Those of a processor that belongs to another backbone."""
    model = Spa3RModel(spa3r_config(backbone_config=depth_anything_3_config()))
    with pytest.raises(ValueError, match=r"must have 48 columns .*got 12. Use the processor that was saved with the m"):
        model.encode(**view_inputs(patch_size=2))


def test_predicted_cameras_need_a_camera_head():
    model = Spa3RModel(spa3r_config(backbone_config=depth_anything_3_config(heads=["depth"])))
    with pytest.raises(ValueError, match=r"This DepthAnything3Model has no camera head"):
        model(**view_inputs())
    inputs = view_inputs()
    assert model(**inputs, **some_cameras(inputs)).geometry_features.isfinite().all()


def test_without_a_depth_head_the_depth_probe_is_left_out_and_the_log_says_so(caplog):
    modeling_spa3r.logger.warning_once.cache_clear()
    Spa3RForPreTraining(pretraining_config(backbone_config=depth_anything_3_config(heads=["camera", "depth"])))
    assert not caplog.messages
    config = pretraining_config(backbone_config=depth_anything_3_config(heads=["camera"]))
    model = Spa3RForPreTraining(config)
    (message,) = caplog.messages
    assert "must have a depth head to pretrain it, got the heads ['camera']. Take a checkpoint with one" in message
    assert not any(parameter.requires_grad for parameter in model.spa3r.depth_probe.parameters())
    assert "depth_probe" not in model(**pretraining_batch()).losses


def test_a_model_that_is_no_backbone_is_refused(tmp_path):
    Spa3RModel(spa3r_config()).save_pretrained(tmp_path)
    words = r"must hold a geometry backbone, such as a VggtModel .*got a model of type 'spa3r'"
    with pytest.raises(ValueError, match=words):
        Spa3RForPreTraining.from_backbone_and_dinov3(tmp_path, targets=["geometry"])
