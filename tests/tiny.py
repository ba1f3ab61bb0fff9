"""Tiny models, inputs and golden tensors from one place, and the tests that all models share."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, DINOv3ViTConfig

from spa3r import DepthAnything3Config, Spa3RConfig, Spa3RImageProcessor, VggtConfig
from spa3r.models.attention import eager_attention_forward, packed_attention
from spa3r.models.cameras import pose_encoding_to_cameras
from spa3r.models.layers import SelfAttention

BACK_ENDS = ("eager", "sdpa", "xformers")
GOLDEN = Path(__file__).parent / "golden"
PATCH = 4

# Three scenes of 2, 5 and 7 views, in three sizes and two orientations: (height, width) in patches.
TALL, WIDE, SMALL = (4, 3), (3, 5), (2, 2)
SCENES = (
    (WIDE, WIDE),
    (TALL, WIDE, TALL, SMALL, WIDE),
    (SMALL, WIDE, TALL, TALL, SMALL, WIDE, SMALL),
)
TARGETS = ((0, 1), (0, 1, 0, 1, 1), (0, 0, 1, 0, 1, 0, 1))
"""Target views, between context views."""


def vggt_config(**fields) -> VggtConfig:
    sizes = {
        **{"patch_size": PATCH, "image_size": 5 * PATCH, "num_hidden_layers": 2, "patch_embedding_num_layers": 1},
        **{"hidden_size": 16, "num_attention_heads": 2, "patch_embedding_num_heads": 2, "num_register_tokens": 2},
        **{"camera_num_layers": 1, "camera_num_heads": 2, "camera_num_iterations": 2},
        **{"dpt_layers": [0, 0, 1, 1], "dpt_channels": [4, 8, 8, 8], "dpt_features": 8},
    }
    return VggtConfig(**(sizes | fields))


def depth_anything_3_config(**fields) -> DepthAnything3Config:
    sizes = {
        **{"patch_size": PATCH, "image_size": 5 * PATCH, "num_hidden_layers": 4, "alternating_start": 2},
        **{"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32},
        **{"camera_encoder_num_layers": 1, "camera_encoder_num_heads": 2},
        **{"dpt_layers": [0, 1, 2, 3], "dpt_channels": [4, 8, 8, 8], "dpt_features": 8},
    }
    return DepthAnything3Config(**(sizes | fields))


def spa3r_config(**fields) -> Spa3RConfig:
    sizes = {
        **{"backbone_config": vggt_config(), "semantic_hidden_size": 16},
        **{"hidden_size": 32, "num_attention_heads": 2, "mlp_ratio": 2, "num_latents": 6, "num_register_tokens": 2},
        **{"num_encoder_layers": 2, "num_decoder_layers": 2},
    }
    return Spa3RConfig(**(sizes | fields))


def teacher_config() -> DINOv3ViTConfig:
    return DINOv3ViTConfig(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32, patch_size=16, image_size=224
    )


def pretraining_config(**fields) -> Spa3RConfig:
    return spa3r_config(**({"semantic_teacher_config": teacher_config()} | fields))


@torch.no_grad()
def alive(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights of which every one matters: no residual branch near zero, no bias at zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        leaf = name.rpartition(".")[2]
        if leaf.startswith("layer_scale") or (leaf == "weight" and parameter.ndim == 1):
            parameter.copy_(1 + 0.2 * noise)
        elif leaf == "weight":
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:  # biases and learned tokens
            parameter.copy_((0.1 if leaf == "bias" else 1.0) * noise)
        if name.endswith("camera_head.output.fc2.bias"):  # a quaternion far from 0, fields of view far from 0
            parameter.copy_(torch.tensor([0.1, -0.2, 0.1, 0.2, -0.3, 0.1, 1.0, 1.0, 1.0]))
        if name.endswith("camera_head.output.fc2.weight"):
            parameter.mul_(0.1)
        if name.endswith("camera_head.quaternion.bias"):
            parameter.copy_(torch.tensor([0.2, -0.3, 0.1, 1.0]))
        if name.endswith("camera_head.field_of_view.bias"):
            parameter.fill_(1.0)
        if name.endswith(("camera_head.quaternion.weight", "camera_head.field_of_view.weight")):
            parameter.mul_(0.1)
    return model.eval()


def view_inputs(scenes=SCENES, targets=None, patch_size: int = PATCH, seed: int = 1) -> dict:
    """What the image processor returns for scenes of views of the given patch grids, as noise."""
    grids = [grid for scene in scenes for grid in scene]
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        "view_pixel_values": torch.randn(sum(h * w for h, w in grids), 3 * patch_size**2, generator=generator),
        "view_grid_hw": torch.tensor(grids).view(-1, 2),
        "views_per_scene": torch.tensor([len(scene) for scene in scenes]),
    }
    if targets is not None:
        inputs["target_mask"] = torch.tensor([bool(target) for scene in targets for target in scene])
    return inputs


def patch_counts(inputs: dict) -> list[int]:
    return inputs["view_grid_hw"].prod(-1).tolist()


def by_scene(rows, inputs: dict, per: str = "view") -> list[Tensor]:
    """A packed output as one flat tensor for each scene; `per` = "view", "patch", or the tokens before the patches."""
    if per != "view":
        prefix = 0 if per == "patch" else int(per)
        rows = rows.split([prefix + count for count in patch_counts(inputs)])
    views = iter(rows)
    return [torch.cat([next(views).reshape(-1) for _ in range(n)]) for n in inputs["views_per_scene"].tolist()]


def arranged(inputs: dict, order) -> dict:
    """The batch of some scenes of a batch, in the given order."""
    counts = inputs["views_per_scene"].tolist()
    starts = [sum(counts[:scene]) for scene in range(len(counts))]
    views = [view for scene in order for view in range(starts[scene], starts[scene] + counts[scene])]
    parts = inputs["view_pixel_values"].split(patch_counts(inputs))
    chosen = {key: value[views] for key, value in inputs.items() if key in ("view_grid_hw", "target_mask")}
    return chosen | {
        "view_pixel_values": torch.cat([parts[view] for view in views]),
        "views_per_scene": inputs["views_per_scene"][list(order)],
    }


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """||ours - reference|| / ||reference||."""
    assert ours.shape == reference.shape
    ours, reference = ours.detach().double(), reference.detach().double()
    return ((ours - reference).norm() / reference.norm().clamp(min=1e-30)).item()


def assert_close(ours: dict, reference: dict, tolerance: float) -> None:
    """Every tensor (or list of tensors) of `reference` is matched; all that fail are named with their error."""
    assert ours.keys() == reference.keys()
    errors = {}
    for key, wanted in reference.items():
        pairs = [(ours[key], wanted)] if isinstance(wanted, Tensor) else list(zip(ours[key], wanted, strict=True))
        errors[key] = max(relative_error(a, b) for a, b in pairs)
    assert not {key: error for key, error in errors.items() if not error <= tolerance}, errors


def realigned(anything):
    """The same model or tensors where fresh ones lie: files are mapped into memory as they are, and there are CPUs
    whose kernels sum in another order when a tensor begins elsewhere."""
    return copy.deepcopy(anything)


def back_ends_in_use(model: nn.Module) -> dict[str, set[str]]:
    """Top-level part -> the back ends that its attention layers look up."""
    used: dict[str, set[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, SelfAttention):
            used.setdefault(name.partition(".")[0], set()).add(module.config._attn_implementation)
    return used


def field_by_scene(out, inputs) -> dict:
    names = ("last_hidden_state", "geometry_features", "semantic_features", "depth")
    field = {name: by_scene(out[name], inputs, "patch") for name in names if name in out}
    return field | {name: by_scene(out[name], inputs) for name in ("extrinsics", "intrinsics")}


def packed_token_scenes_and_targets(inputs, special) -> tuple[Tensor, Tensor]:
    """Of every token of the aggregator: its scene, and whether its view is a target."""
    lengths = torch.tensor([special + count for count in patch_counts(inputs)])
    scenes = torch.arange(len(inputs["views_per_scene"])).repeat_interleave(inputs["views_per_scene"])
    return scenes.repeat_interleave(lengths), inputs["target_mask"].repeat_interleave(lengths)


def densely_masked(model, inputs, monkeypatch, **kwargs):
    """The backbone on views in their own order, its global layers under one explicit mask over the whole batch."""
    scene, target = packed_token_scenes_and_targets(inputs, model.num_special_tokens)
    allowed = (scene[:, None] == scene) & (target[:, None] | ~target)
    assert allowed.any(-1).all() and not allowed.all()
    global_attentions = {layer.attention for layer in model.global_layers}

    def attend(module, query, key, value, segments, scaling=None):
        if module not in global_attentions:
            return packed_attention(module, query, key, value, segments, scaling)
        heads_first = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))
        return eager_attention_forward(module, *heads_first, mask, scaling=query.shape[-1] ** -0.5)[0][0]

    with monkeypatch.context() as patch:
        patch.setattr("spa3r.models.layers.packed_attention", attend)
        return model(**{key: value for key, value in inputs.items() if key != "target_mask"}, **kwargs)


# Golden tensors -------------------------------------------------------------------------------------------------------

GOLDEN_VGGT_FIELDS = {"patch_embedding_num_heads": 2, "camera_num_heads": 2, "dpt_layers": [0, 1, 2, 3]}
GOLDEN_SPA3R_FIELDS = {
    "backbone_config": GOLDEN_VGGT_FIELDS,
    "semantic_teacher_config": {"num_attention_heads": 2},
}
"""What the shapes of the golden weights don't tell."""


GOLDEN_DEPTH_ANYTHING_3_FIELDS = {"camera_encoder_num_heads": 2, "dpt_layers": [2, 3, 4, 5]}


def golden(name: str, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a golden file whose names start with `prefix`, which is taken off."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def golden_inputs(name: str) -> dict:
    """`inputs.images` (B, V, 3, H, W) in [0, 1], as the image processor would pack them."""
    images = golden(name, "inputs.")["images"]
    processor = Spa3RImageProcessor()
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    return packed_images((images - mean) / std)


def packed_images(images: Tensor) -> dict:
    """Normalized images (B, V, 3, H, W) as the image processor would pack them."""
    scenes, views, _, height, width = images.shape
    grid, p = (height // 14, width // 14), 14
    patches = images.reshape(scenes * views, 3, grid[0], p, grid[1], p).permute(0, 2, 4, 1, 3, 5)
    return {
        "view_pixel_values": patches.reshape(-1, 3 * p * p),
        "view_grid_hw": torch.tensor([grid] * (scenes * views)),
        "views_per_scene": torch.tensor([views] * scenes),
    }


def released_checkpoints(folder: Path) -> dict[str, Path]:
    """The golden weights as files in the released layouts: name of the layout -> file or folder."""
    files = {
        "vggt-folder": folder / "vggt" / "model.safetensors",
        "vggt-pt": folder / "model.pt",
        "depth-anything-3-folder": folder / "depth-anything-3" / "model.safetensors",
        "spa3r-ckpt": folder / "spa3r.ckpt",
        "spa3r-safetensors": folder / "spa3r.safetensors",
    }
    files["vggt-folder"].parent.mkdir(parents=True)
    vggt = golden("vggt", "weights.") | {"track_head.corr_mlp.fc1.weight": torch.ones(2, 2)}
    save_file(vggt, files["vggt-folder"])
    torch.save(vggt, files["vggt-pt"])
    files["depth-anything-3-folder"].parent.mkdir()
    save_file(golden("depth_anything_3", "weights."), files["depth-anything-3-folder"])
    hub_config = {"model_name": "da3-tiny", "config": {"__object__": {"name": "DepthAnything3Net"}}}  # as on the hub
    (folder / "depth-anything-3" / "config.json").write_text(json.dumps(hub_config))
    spa3r = golden("spa3r_asymmetric", "weights.")
    spa3r |= {f"dino.{key}": tensor for key, tensor in golden("spa3r_asymmetric", "teacher.").items()}
    save_file(spa3r, files["spa3r-safetensors"])
    lightning = {"epoch": 3, "global_step": 80000, "pytorch-lightning_version": "2.5.0", "hyper_parameters": {}}
    torch.save(lightning | {"state_dict": {f"model.{k}": v for k, v in spa3r.items()}}, files["spa3r-ckpt"])
    return {layout: file.parent if layout.endswith("-folder") else file for layout, file in files.items()}


# Tests of every model -------------------------------------------------------------------------------------------------


class ModelTests:
    """What must hold for each of our models; a subclass says how to build one and what it returns.

    Attributes:
        model_class: The class under test.
        auto_class: The Auto class that must find it.
        targets: Target views of the three scenes, where the model takes them.
        half_tolerance: Relative error allowed in half precision, by dtype.
    """

    model_class: type
    auto_class: type
    targets = None
    half_tolerance = {torch.bfloat16: 0.03, torch.float16: 0.005}

    def config(self, **fields):
        raise NotImplementedError

    def outputs(self, model, inputs) -> dict[str, list[Tensor]]:
        """Of every output, one tensor for each scene."""
        raise NotImplementedError

    def loss(self, model, inputs) -> Tensor:
        """A number on which every trainable parameter bears."""
        raise NotImplementedError

    def make(self, back_end: str = "sdpa", **fields):
        model = alive(self.model_class(self.config(**fields)))
        model.set_attn_implementation(back_end)
        return model

    def inputs(self, scenes=SCENES, targets=None) -> dict:
        return view_inputs(scenes, self.targets if scenes is SCENES else targets)

    @torch.no_grad()
    def run(self, model, inputs) -> dict[str, list[Tensor]]:
        return self.outputs(model, inputs)

    @pytest.mark.parametrize("back_end", BACK_ENDS)
    def test_a_scene_is_the_same_packed_and_alone(self, back_end):
        model, inputs = self.make(back_end), self.inputs()
        packed = self.run(model, inputs)
        alone = [self.run(model, arranged(inputs, [scene])) for scene in range(len(SCENES))]
        assert_close(packed, {key: [part[key][0] for part in alone] for key in packed}, 1e-5)

    def test_order_of_scenes_does_not_matter(self):
        model, inputs, order = self.make(), self.inputs(), (2, 0, 1)
        plain, turned = self.run(model, inputs), self.run(model, arranged(inputs, order))
        assert_close(turned, {key: [value[scene] for scene in order] for key, value in plain.items()}, 1e-5)

    @pytest.mark.parametrize("back_end", ("eager", "xformers"))
    def test_back_ends_agree(self, back_end):
        inputs = self.inputs()
        assert_close(self.run(self.make(back_end), inputs), self.run(self.make("sdpa"), inputs), 1e-5)

    @pytest.mark.parametrize("views", (1, 64))
    def test_one_view_and_many(self, views):
        targets = None if self.targets is None else [[view % 2 for view in range(views)]]
        inputs = self.inputs([[SMALL] * views], targets)
        outputs = self.run(self.make(), inputs)
        assert all(value.isfinite().all() for values in outputs.values() for value in values)

    def test_gradients_reach_all_trainable_parameters_and_no_other(self):
        model = self.make().train()
        self.loss(model, self.inputs()).backward()
        silent = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
        frozen = [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
        assert (silent, frozen) == ([], [])
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

    def test_gradient_checkpointing_changes_nothing(self):
        inputs, results = self.inputs(), []
        for checkpointing in (False, True):
            model = self.make().train()
            if checkpointing:
                model.gradient_checkpointing_enable()
                assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
            loss = self.loss(model, inputs)
            loss.backward()
            grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
            results.append(grads | {"loss": loss})
        assert_close(results[1], results[0], 1e-6)

    def test_saved_and_loaded_is_the_same(self, tmp_path):
        model, inputs = self.make(), self.inputs()
        model.save_pretrained(tmp_path)
        loaded = self.model_class.from_pretrained(tmp_path, attn_implementation="sdpa")
        assert not loaded.training
        assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
        volatile = ("_name_or_path", "transformers_version", "architectures", "dtype")
        ours, theirs = (dict(m.config.to_dict()) for m in (model, loaded))
        assert {k: v for k, v in theirs.items() if k not in volatile and not isinstance(v, dict)} == {
            k: v for k, v in ours.items() if k not in volatile and not isinstance(v, dict)
        }
        weights = loaded.state_dict()
        assert weights.keys() == model.state_dict().keys()
        assert all(torch.equal(weights[key], tensor) for key, tensor in model.state_dict().items())
        assert_close(self.run(realigned(loaded), inputs), self.run(model, inputs), 0.0)

    def test_shards_auto_class_and_device_map(self, tmp_path):
        model, inputs = self.make(), self.inputs()
        model.save_pretrained(tmp_path, max_shard_size="20KB")
        Spa3RImageProcessor(patch_size=PATCH, size=5 * PATCH).save_pretrained(tmp_path)
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
        loaded = self.auto_class.from_pretrained(tmp_path, device_map="cpu", attn_implementation="sdpa")
        assert type(loaded) is self.model_class
        assert_close(self.run(realigned(loaded), inputs), self.run(model, inputs), 0.0)
        processor = AutoImageProcessor.from_pretrained(tmp_path)
        assert type(processor) is Spa3RImageProcessor and (processor.patch_size, processor.size) == (PATCH, 5 * PATCH)

    @pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bf16", "fp16"))
    def test_half_precision_is_close_and_poses_stay_float32(self, dtype, tmp_path):
        model, inputs = self.make(), self.inputs()
        model.save_pretrained(tmp_path)
        half = self.model_class.from_pretrained(tmp_path, dtype=dtype, attn_implementation="sdpa")
        dtypes = {True: set(), False: set()}
        for name, parameter in half.named_parameters():
            dtypes[any(part in name for part in half._keep_in_fp32_modules_strict)].add(parameter.dtype)
        assert dtypes == {True: {torch.float32}, False: {dtype}}
        reference, ours = self.run(model, inputs), self.run(half, inputs)
        for key in ("extrinsics", "intrinsics"):
            assert {value.dtype for value in ours.get(key, [])} <= {torch.float32}
        assert_close(ours, reference, self.half_tolerance[dtype])

    def _checkpoint(self, folder, change) -> Path:
        """A saved model, its tensors changed."""
        self.make().save_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    some_key = "encoder.query_tokens"

    def test_loading_refuses_missing_keys(self, tmp_path):
        self._checkpoint(tmp_path, lambda weights: weights.pop(self.some_key))
        with pytest.raises(ValueError, match=rf"lacks keys of {self.model_class.__name__}: {self.some_key}"):
            self.model_class.from_pretrained(tmp_path)

    def test_loading_refuses_foreign_keys(self, tmp_path):
        self._checkpoint(tmp_path, lambda weights: weights.update({"stranger.weight": torch.ones(2)}))
        with pytest.raises(ValueError, match=rf"has unexpected keys of {self.model_class.__name__}: stranger.weight"):
            self.model_class.from_pretrained(tmp_path)

    def test_loading_refuses_other_shapes(self, tmp_path):
        self._checkpoint(tmp_path, lambda weights: weights.update({self.some_key: torch.ones(1, 3)}))
        words = rf"tensors of other shapes than {self.model_class.__name__}: {self.some_key} \(1, 3\), wanted \(1, \d+"
        with pytest.raises(ValueError, match=words):
            self.model_class.from_pretrained(tmp_path)

    def test_loading_refuses_truncated_files(self, tmp_path):
        file = self._checkpoint(tmp_path, lambda weights: None) / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(
            ValueError, match=r"model\.safetensors can't be read as safetensors .* truncated or damaged"
        ):
            self.model_class.from_pretrained(tmp_path)


def some_cameras(inputs) -> dict:
    """A rigid camera for every view."""
    pose = torch.randn(len(inputs["view_grid_hw"]), 9)
    pose[:, 7:] = 0.8
    extrinsics, intrinsics = pose_encoding_to_cameras(pose, (inputs["view_grid_hw"] * PATCH).tolist())
    return {"extrinsics": extrinsics, "intrinsics": intrinsics}
