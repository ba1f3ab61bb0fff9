"""A scene belongs to the weights and the adapters that encoded it, wherever they lie."""

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_spa3_vlm import PICTURES, WORDS, Composed, make

from spa3r.models.spa3_vlm.fingerprints import model_fingerprint
from spa3r.models.spa3_vlm.scenes import EncodedScene, SceneCache

PLACES = r"vlm.*language_model.*\.(q_proj|v_proj)"
REFUSED = (
    r"must be a scene of this model .* got one of another model .* other active adapters .* encode the scene again"
)


def lora(**kwargs) -> LoraConfig:
    return LoraConfig(target_modules=PLACES, init_lora_weights=False, r=4, **kwargs)


@pytest.fixture(scope="module")
def plain() -> Composed:
    return make()


@pytest.fixture
def composed(plain) -> Composed:
    return Composed(copy.deepcopy(plain.model), plain.processor)


def test_scenes_of_other_adapters_are_refused(composed, tmp_path):
    peft = get_peft_model(composed.model, lora(), adapter_name="chairs")
    peft.add_adapter("rooms", lora())
    scenes = SceneCache(max_bytes=2**30)
    encode = lambda: peft.encode_scene(composed.processor, PICTURES)  # noqa: E731
    scene = scenes.get_or_encode("room", encode)
    scene.save(tmp_path / "scene.safetensors")
    kept = composed.ask(scene)

    def refused():
        for asked in (scene, scenes.get_or_encode("room", encode)):
            with pytest.raises(ValueError, match=REFUSED):
                peft.ask(asked, "What?", max_new_tokens=WORDS)
        with pytest.raises(ValueError, match=REFUSED):
            EncodedScene.load(tmp_path / "scene.safetensors", composed.model, composed.processor)

    peft.set_adapter("rooms")
    refused()
    peft.base_model.set_adapter(["chairs", "rooms"])
    refused()
    peft.set_adapter("chairs")
    assert composed.ask(EncodedScene.load(tmp_path / "scene.safetensors", composed.model, composed.processor)) == kept
    with peft.disable_adapter():
        refused()
    assert composed.ask(scene) == kept
    peft.merge_adapter()
    refused()
    peft.unmerge_adapter()
    peft.delete_adapter("rooms")  # it did not act
    weight = next(p for name, p in composed.model.named_parameters() if "lora_B.chairs" in name)
    with torch.no_grad():
        weight.add_(1e-3)
    refused()
    peft.unload()
    refused()


def test_what_a_fingerprint_says_of_adapters(plain, composed):
    model = composed.model
    alone = model_fingerprint(plain.model)
    peft = get_peft_model(model, lora(), adapter_name="a")
    told = {"a": model_fingerprint(model)}
    with peft.disable_adapter():
        assert model_fingerprint(model) == alone
    peft.add_adapter("b", lora())
    assert model_fingerprint(model) == told["a"]  # loaded, not active
    peft.set_adapter("b")
    told["b"] = model_fingerprint(model)
    parameters = dict(model.named_parameters())
    with torch.no_grad():  # each the other's weights
        for name in parameters:
            if ".a." in name:
                first, second = parameters[name], parameters[name.replace(".a.", ".b.")]
                first_values = first.clone()
                first.copy_(second)
                second.copy_(first_values)
    told["b with the weights of a"] = model_fingerprint(model)
    for layer in model.modules():
        if hasattr(layer, "scale_layer"):
            layer.scale_layer(2.0)
    told["stronger"] = model_fingerprint(model)
    peft.base_model.set_adapter(["b", "a"])
    told["both"] = model_fingerprint(model)
    peft.merge_adapter(["a"])
    told["one of both merged"] = model_fingerprint(model)
    assert len({alone, *told.values()}) == len(told) + 1, told
    assert model_fingerprint(peft.unload()) != alone  # merged weights stay merged


@pytest.mark.parametrize("config", [
    LoraConfig(target_modules=PLACES, init_lora_weights=False, use_dora=True),
    LoraConfig(target_modules=PLACES, init_lora_weights=False, modules_to_save=["adapter"]),
    LoraConfig(target_modules=PLACES, trainable_token_indices={"embed_tokens": [3, 5]}),
    IA3Config(target_modules=PLACES, feedforward_modules=[], init_ia3_weights=False),
], ids=["dora", "modules_to_save", "tokens", "ia3"])  # fmt: skip
def test_other_kinds_of_adapters(plain, composed, config, tmp_path):
    peft = get_peft_model(composed.model, config)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    active = model_fingerprint(composed.model)
    assert active != model_fingerprint(plain.model)
    with peft.disable_adapter():
        assert model_fingerprint(composed.model) == model_fingerprint(plain.model)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.01)
    trained = model_fingerprint(composed.model)
    assert trained != active
    peft.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(plain.model), tmp_path)
    assert model_fingerprint(again.get_base_model()) == trained == model_fingerprint(composed.model)


def test_adapters_without_a_wrapper_around_the_model(plain, composed):
    model = composed.model
    inject_adapter_in_model(lora(), model, adapter_name="chairs")
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    scene = composed.encode()
    answers = composed.ask(scene)
    for layer in layers:
        layer.enable_adapters(False)
    assert model_fingerprint(model) == model_fingerprint(plain.model)
    with pytest.raises(ValueError, match=REFUSED):
        composed.ask(scene)
    for layer in layers:
        layer.enable_adapters(True)
    assert composed.ask(scene) == answers


def test_where_the_parts_of_a_checkpoint_come_from_makes_no_difference(composed):
    before = model_fingerprint(composed.model)
    composed.model.config.spa3r_config.backbone_name_or_path = "somebody/vggt"
    assert model_fingerprint(composed.model) == before
