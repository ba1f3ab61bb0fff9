"""Quantized parts: what stays unquantized, and models that are combined, saved, loaded, trained and asked again."""

import copy

import pytest
import torch
from command_line import run_json
from safetensors import safe_open
from tiny import alive
from tiny_spa3_vlm import PICTURES, Composed, prompt
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, TorchAoConfig

from spa3r import Spa3RModel, Spa3VLM, VggtModel
from spa3r.models.spa3_vlm.fingerprints import model_fingerprint
from spa3r.models.spa3_vlm.scenes import EncodedScene
from spa3r.rooms.embedded import embedded_model


@pytest.fixture(scope="module")
def embedded(tmp_path_factory) -> tuple[Composed, str]:
    composed = Composed(*embedded_model())
    folder = tmp_path_factory.mktemp("quantization") / "model"
    composed.model.save_pretrained(folder)
    composed.model.vlm.save_pretrained(folder / "vlm")
    return composed, str(folder)


def of_bits(bits: int, **fields) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, **fields)


def quantized_parts(model: nn.Module) -> set[str]:
    kinds = {"Linear4bit", "Linear8bitLt", "Int8Tensor"}  # modules of bitsandbytes, weights of torchao
    return {
        name.partition(".")[0]
        for name, module in model.named_modules()
        if kinds & {type(module).__name__, type(getattr(module, "weight", None)).__name__}
    }


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("skip", [None, ["lm_head"]])
def test_only_the_vlm_is_quantized(embedded, bits, skip):
    composed, folder = embedded
    given = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, llm_int8_skip_modules=skip)
    model = Spa3VLM.from_pretrained(folder, quantization_config=given)
    assert quantized_parts(model) == {"vlm"} and given.llm_int8_skip_modules == skip
    assert type(model.get_output_embeddings()) is nn.Linear
    for part in ("spa3r", "adapter"):
        wanted = getattr(composed.model, part).state_dict()
        assert all(torch.equal(value, wanted[name]) for name, value in getattr(model, part).state_dict().items()), part
    assert model(**prompt(composed)).logits.isfinite().all()


def test_a_vlm_is_quantized_while_it_is_combined(embedded, tmp_path):
    composed, folder = embedded
    spa3r = copy.deepcopy(composed.model.spa3r)
    model = Spa3VLM.from_vlm_and_spa3r(f"{folder}/vlm", spa3r, quantization_config={"load_in_4bit": True})
    assert quantized_parts(model) == {"vlm"}
    appends = Spa3VLM.from_vlm_and_spa3r(composed.model.vlm, spa3r, integration="append")
    appends.save_pretrained(tmp_path)
    again = Spa3VLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    assert quantized_parts(again) == {"vlm"} and type(again.adapter.projector.fc1) is nn.Linear


@pytest.mark.parametrize("bits", [8, 4])
def test_the_camera_head_of_a_geometry_model_is_never_quantized(embedded, bits, tmp_path):
    given = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    spa3r = Spa3RModel.from_pretrained("embedded", quantization_config=given)
    Spa3RModel.from_pretrained("embedded").backbone.save_pretrained(tmp_path)
    vggt = VggtModel.from_pretrained(tmp_path, quantization_config=given)
    for model, head in ((spa3r, spa3r.backbone.camera_head), (vggt, vggt.camera_head)):
        assert quantized_parts(model) and not quantized_parts(head)
        assert {parameter.dtype for parameter in head.parameters()} == {torch.float32}


def test_quantizations_that_can_leave_nothing_out_are_refused(embedded):
    class Whole:
        pass

    with pytest.raises(ValueError, match=r"must be one that can leave modules out .*, got Whole, and 'spa3r'"):
        Spa3VLM.from_pretrained(embedded[1], quantization_config=Whole())


# Combined after quantizing --------------------------------------------------------------------------------------------


def combine(embedded, vlm_way=None, spa3r_way=None, integration="cross_attention") -> Composed:
    """A VLM and a Spa3R, each quantized or not by its own ``from_pretrained``; the adapter's weights are random."""
    composed, folder = embedded
    vlm, spa3r = copy.deepcopy(composed.model.vlm), copy.deepcopy(composed.model.spa3r)
    if vlm_way is not None:
        vlm = AutoModelForImageTextToText.from_pretrained(f"{folder}/vlm", quantization_config=way(vlm_way))
    if spa3r_way is not None:
        spa3r = Spa3RModel.from_pretrained("embedded", quantization_config=way(spa3r_way))
    model = Spa3VLM.from_vlm_and_spa3r(vlm, spa3r, integration=integration)
    alive(model.adapter)
    processor = copy.copy(composed.processor)
    processor.spatial_tokens = model.config.spatial_tokens
    return Composed(model, processor)


def way(name: int | str) -> BitsAndBytesConfig | TorchAoConfig:
    """How to quantize: bitsandbytes by its number of bits, torchao by the name of its configuration."""
    if isinstance(name, int):
        return of_bits(name)
    return TorchAoConfig(getattr(pytest.importorskip("torchao.quantization"), name)())


def words(composed: Composed) -> list[int]:
    return composed.model.generate(**prompt(composed), max_new_tokens=3, do_sample=False)[0].tolist()


@pytest.mark.parametrize(
    ("vlm_way", "spa3r_way", "integration"),
    [
        (4, None, "cross_attention"),
        pytest.param(8, None, "append", marks=pytest.mark.slow),
        pytest.param(4, None, "append", marks=pytest.mark.slow),
        pytest.param(None, 8, "cross_attention", marks=pytest.mark.slow),
        pytest.param(4, 4, "cross_attention", marks=pytest.mark.slow),
        pytest.param("Int8WeightOnlyConfig", None, "cross_attention", marks=pytest.mark.slow),
        pytest.param("Int8DynamicActivationInt8WeightConfig", None, "append", marks=pytest.mark.slow),
        pytest.param(None, "Int8WeightOnlyConfig", "cross_attention", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_quantized_parts_are_combined_saved_and_loaded(embedded, vlm_way, spa3r_way, integration, tmp_path):
    composed = combine(embedded, vlm_way, spa3r_way, integration)
    model = composed.model
    parts = {part for part, given in (("vlm", vlm_way), ("spa3r", spa3r_way)) if given is not None}
    assert quantized_parts(model) == parts and model.is_quantized
    assert {parameter.dtype for parameter in model.adapter.parameters()} == {torch.float32}
    wanted = model(**prompt(composed)).logits
    model.save_pretrained(tmp_path)
    assert f"loading it needs {model.quantization_method.value}" in (tmp_path / "README.md").read_text()
    loaded = Spa3VLM.from_pretrained(tmp_path)
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert {name: type(module) for name, module in loaded.named_modules()} == kinds
    again = Composed(loaded, composed.processor)
    torch.testing.assert_close(loaded(**prompt(again)).logits, wanted, rtol=0, atol=0)
    assert words(again) == words(composed)
    assert model_fingerprint(loaded) == model_fingerprint(model)
    loaded.save_pretrained(tmp_path / "again")
    assert model_fingerprint(Spa3VLM.from_pretrained(tmp_path / "again")) == model_fingerprint(model)


def test_parts_quantized_in_different_ways_are_refused(embedded):
    with pytest.raises(ValueError, match=r"`vlm` and `spa3r` must be quantized in the same way, got BitsAndBytesCon"):
        combine(embedded, 4, 8)


def test_a_vlm_quantized_in_a_way_that_excludes_nothing_is_refused(embedded):
    composed, folder = embedded
    vlm = AutoModelForImageTextToText.from_pretrained(f"{folder}/vlm", quantization_config=of_bits(8))
    del vlm.hf_quantizer.quantization_config.llm_int8_skip_modules
    with pytest.raises(
        ValueError, match=r"`vlm` must be quantized in a way that can leave modules out .*, got BitsAnd"
    ):
        Spa3VLM.from_vlm_and_spa3r(vlm, copy.deepcopy(composed.model.spa3r))


def test_a_quantized_model_is_saved_without_its_backbone(embedded, tmp_path):
    model = combine(embedded, 4).model
    model.spa3r.config.backbone_name_or_path = folder_of_backbone = str(tmp_path / "backbone")
    model.spa3r.backbone.save_pretrained(folder_of_backbone)
    model.save_pretrained(tmp_path / "saved", include_backbone=False)
    with safe_open(tmp_path / "saved" / "model.safetensors", framework="pt") as saved:
        assert not [key for key in saved.keys() if key.startswith("spa3r.backbone.")]
    loaded = Spa3VLM.from_pretrained(tmp_path / "saved")
    for name, tensor in model.spa3r.state_dict().items():
        assert torch.equal(loaded.spa3r.state_dict()[name], tensor), name


@torch.no_grad()
def test_a_scene_of_the_unquantized_model_is_refused(embedded, tmp_path):
    composed, folder = embedded
    quantized = Spa3VLM.from_pretrained(folder, quantization_config=of_bits(8))
    for first, second in ((composed.model, quantized), (quantized, composed.model)):
        first.encode_scene(composed.processor, PICTURES[:1]).save(tmp_path / "scene.safetensors")
        with pytest.raises(ValueError, match="another model"):
            EncodedScene.load(tmp_path / "scene.safetensors", second, composed.processor)


@pytest.mark.slow
@pytest.mark.parametrize("integration", ["cross_attention", "append"])
def test_lora_on_a_quantized_language_model(embedded, integration, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    composed = combine(embedded, 4, integration=integration)
    composed.model.save_pretrained(tmp_path / "base")
    before = {name: value.clone() for name, value in composed.model.state_dict().items() if value.dtype == torch.uint8}
    names = [
        name
        for name, module in composed.model.named_modules()
        if name.startswith("vlm.") and type(module).__name__ == "Linear4bit" and "q_proj" in name
    ]
    model = get_peft_model(composed.model, LoraConfig(r=2, target_modules=names, modules_to_save=["adapter"]))
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    inputs = prompt(composed)
    losses = []
    for _ in range(3):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        assert any(p.grad.any() for name, p in model.named_parameters() if "lora_B" in name)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    for name, value in before.items():
        now = next(
            tensor for key, tensor in model.state_dict().items() if key.replace("base_layer.", "").endswith(name)
        )
        assert torch.equal(now, value), name
    model.eval().save_pretrained(tmp_path / "lora")
    loaded = PeftModel.from_pretrained(Spa3VLM.from_pretrained(tmp_path / "base"), tmp_path / "lora")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_the_command_line_asks_a_quantized_model(embedded, bits, tmp_path):
    composed = combine(embedded, bits)
    composed.model.save_pretrained(tmp_path / "model")
    composed.processor.save_pretrained(tmp_path / "model")
    picture = tmp_path / "a.png"
    PICTURES[0].save(picture)
    result = run_json("ask", picture, "What?", "--model", tmp_path / "model")
    assert result["answers"]


def test_offloading_a_quantized_model_fails_as_for_a_plain_vlm(embedded, tmp_path):
    """bitsandbytes offloads to the CPU only from a GPU, and never to the disk."""
    _, folder = embedded
    errors = []
    for load, name, places in (
        (AutoModelForImageTextToText, f"{folder}/vlm", {"model": "disk", "lm_head": "cpu"}),
        (Spa3VLM, folder, {"vlm": "disk", "adapter": "cpu", "spa3r": "cpu"}),
    ):
        with pytest.raises(ValueError, match="Some modules are dispatched on the CPU or the disk") as error:
            load.from_pretrained(name, device_map=places, quantization_config=of_bits(4), offload_folder=tmp_path)
        errors.append(str(error.value))
    assert errors[0] == errors[1]
