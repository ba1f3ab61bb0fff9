"""Weights that are offloaded: results, fingerprints and files stay right."""

import copy
from concurrent.futures import ThreadPoolExecutor

import accelerate
import pytest
import torch
from tiny_spa3_vlm import PICTURES, QUESTIONS, Composed, make, prompt
from transformers import AutoModelForImageTextToText

from spa3r import Spa3RModel, Spa3VLM, VggtModel
from spa3r.models.spa3_vlm.fingerprints import model_fingerprint
from spa3r.models.spa3_vlm.scenes import EncodedScene
from spa3r.rooms.embedded import embedded_model


@pytest.fixture(scope="module")
def embedded(tmp_path_factory) -> tuple[Composed, str]:
    composed = Composed(*embedded_model())
    folder = tmp_path_factory.mktemp("placement") / "model"
    composed.model.save_pretrained(folder)
    composed.model.vlm.save_pretrained(folder / "vlm")
    return composed, str(folder)


CPU = {"vlm": "cpu", "adapter": "cpu", "spa3r": "cpu"}


@pytest.mark.parametrize(
    "places",
    [
        pytest.param(CPU | {"spa3r": "disk"}, marks=pytest.mark.slow),
        pytest.param(CPU | {"adapter": "disk"}, marks=pytest.mark.slow),
        pytest.param(CPU | {"vlm": "disk"}, marks=pytest.mark.slow),
        pytest.param(CPU | {"vlm": "disk", "spa3r": "disk"}, marks=pytest.mark.slow),
        {"vlm.model.visual": "disk", "vlm.model.language_model": "cpu", "vlm.lm_head": "cpu"} | CPU,
        {"spa3r.backbone": "disk", "spa3r.encoder": "cpu", "spa3r.decoder": "cpu", "spa3r": "cpu"} | CPU,
        pytest.param({"": "disk"}, marks=pytest.mark.slow),
    ],
    ids=["spa3r", "adapter", "vlm", "both", "vision", "backbone", "everything"],
)
@torch.no_grad()
def test_any_part_can_be_offloaded(embedded, places, tmp_path):
    composed, folder = embedded
    places = {path: place for path, place in places.items() if path != "vlm" or "vlm.lm_head" not in places}
    if "spa3r.backbone" in places:
        parts = [name for name, _ in composed.model.spa3r.named_children()]
        places = {key: value for key, value in places.items() if key != "spa3r"} | {
            f"spa3r.{part}": places.get(f"spa3r.{part}", "cpu") for part in parts
        }
    model = Spa3VLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
    assert any(p.device.type == "meta" for p in model.parameters()) and model.device.type == "cpu"
    inputs = prompt(composed)
    torch.testing.assert_close(model(**inputs).logits, composed.model(**inputs).logits)
    assert model_fingerprint(model) == model_fingerprint(composed.model)
    scene = model.encode_scene(composed.processor, PICTURES)
    few = {"max_new_tokens": 3}
    answers = composed.ask(composed.encode(), **few)
    assert Composed(model, composed.processor).ask(scene, **few) == answers
    scene.save(tmp_path / "scene.safetensors")
    loaded = EncodedScene.load(tmp_path / "scene.safetensors", model, composed.processor)
    assert composed.ask(loaded, **few) == answers
    model.save_pretrained(tmp_path / "again")
    assert model_fingerprint(Spa3VLM.from_pretrained(tmp_path / "again")) == model_fingerprint(composed.model)


def vggt_on_disk(folder: str, tmp_path) -> tuple[VggtModel, VggtModel]:
    vggt = Spa3RModel.from_pretrained("embedded").backbone
    vggt.save_pretrained(tmp_path / "vggt")
    offloaded = VggtModel.from_pretrained(tmp_path / "vggt", device_map={"": "disk"}, offload_folder=tmp_path / "off")
    return vggt, offloaded


@torch.no_grad()
def test_geometry_alone_can_be_offloaded(embedded, tmp_path):
    composed, folder = embedded
    views = composed.processor.view_image_processor([PICTURES[0], PICTURES[1]])
    spa3r = composed.model.spa3r
    spa3r.save_pretrained(tmp_path / "spa3r")
    offloaded = Spa3RModel.from_pretrained(tmp_path / "spa3r", device_map={"": "disk"}, offload_folder=tmp_path / "o")
    torch.testing.assert_close(offloaded.encode(**views), spa3r.encode(**views))
    wanted = spa3r(**views)
    torch.testing.assert_close(offloaded(**views).to_tuple(), wanted.to_tuple())
    field = offloaded.decode(wanted.latents, wanted.extrinsics, wanted.intrinsics, views["view_grid_hw"], [2])
    torch.testing.assert_close(field.last_hidden_state, wanted.last_hidden_state)
    vggt, offloaded = vggt_on_disk(folder, tmp_path)
    chosen = {"output_cameras": True, "output_layers": (0, -1)}
    torch.testing.assert_close(offloaded(**views, **chosen).to_tuple(), vggt(**views, **chosen).to_tuple())
    spa3r.config.backbone_name_or_path = str(tmp_path / "vggt")
    try:
        spa3r.save_pretrained(tmp_path / "without", include_backbone=False)
    finally:
        spa3r.config.backbone_name_or_path = None
    parts = Spa3RModel.from_pretrained(tmp_path / "without", device_map={"": "disk"}, offload_folder=tmp_path / "p")
    torch.testing.assert_close(parts.encode(**views), spa3r.encode(**views))


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "gemma3"])
@torch.no_grad()
def test_offloaded_families(name):
    """Some have weights of their own in the module that makes image features."""
    composed = make(name)
    inputs = prompt(composed)
    wanted = composed.model(**inputs).logits
    offloaded = accelerate.cpu_offload(copy.deepcopy(composed.model), execution_device=torch.device("cpu"))
    assert all(parameter.device.type == "meta" for parameter in offloaded.parameters())
    torch.testing.assert_close(offloaded(**inputs).logits, wanted)
    assert model_fingerprint(offloaded) == model_fingerprint(composed.model)


@torch.no_grad()
def test_threads_share_an_offloaded_model():
    composed = make("qwen2_5_vl")
    wanted = composed.alone(QUESTIONS[:1])
    offloaded = Composed(
        accelerate.cpu_offload(composed.model, execution_device=torch.device("cpu")), composed.processor
    )
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda _: (offloaded.alone(QUESTIONS[:1]), offloaded.encode().rope_delta), range(8)))
    assert got == [(wanted, got[0][1])] * 8


@pytest.mark.parametrize("disk", ["model.visual", "model.language_model.layers"])
@torch.no_grad()
def test_an_offloaded_vlm_takes_a_spa3r_and_leaves_it_whole(embedded, disk, tmp_path):
    composed, folder = embedded
    language = [f"model.language_model.{name}" for name, _ in composed.model.vlm.get_decoder().named_children()]
    places = dict.fromkeys(("model.visual", "lm_head", *language), "cpu") | {disk: "disk"}
    vlm = AutoModelForImageTextToText.from_pretrained(f"{folder}/vlm", device_map=places, offload_folder=tmp_path)
    spa3r = copy.deepcopy(composed.model.spa3r)
    model = Spa3VLM.from_vlm_and_spa3r(vlm, spa3r)
    assert model.spa3r is spa3r and {p.device.type for p in spa3r.parameters()} == {"cpu"}
    assert {p.device.type for p in model.adapter.parameters()} == {"cpu"}
    model.adapter.load_state_dict(composed.model.adapter.state_dict())
    inputs = prompt(composed)
    wanted = composed.model(**inputs).logits
    torch.testing.assert_close(model(**inputs).logits, wanted)
    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(Spa3VLM.from_pretrained(tmp_path / "saved")(**inputs).logits, wanted)
    spa3r.save_pretrained(tmp_path / "spa3r")
    offloaded = Spa3RModel.from_pretrained(tmp_path / "spa3r", device_map={"": "disk"}, offload_folder=tmp_path / "o")
    both = Spa3VLM.from_vlm_and_spa3r(vlm, offloaded)
    both.adapter.load_state_dict(composed.model.adapter.state_dict())
    torch.testing.assert_close(both(**inputs).logits, wanted)


# Forms of output ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_tuples_and_outputs_that_are_refused(embedded):
    composed, _ = embedded
    views = composed.processor.view_image_processor([PICTURES[0], PICTURES[1]])
    spa3r = composed.model.spa3r
    for model in (spa3r, spa3r.backbone):
        named, plain = model(**views), model(**views, return_dict=False)
        assert type(plain) is tuple
        torch.testing.assert_close(plain, named.to_tuple())
        with pytest.raises(ValueError, match=r"`output_attentions` must be left out .* attention doesn't compute"):
            model(**views, output_attentions=True)
        with pytest.raises(ValueError, match=r"`output_hidden_states` must be left out .*output_layers=range\(n\)"):
            model(**views, output_hidden_states=True)
        assert type(model(**views, output_hidden_states=False, output_attentions=None)) is type(named)
    layers = spa3r.backbone(**views, output_layers=range(spa3r.backbone.config.num_hidden_layers)).tokens
    assert len(layers) == spa3r.backbone.config.num_hidden_layers
    inputs = prompt(composed)
    with pytest.raises(ValueError, match=r"`output_attentions` needs .* 'eager', got .*set_attn_implementation"):
        composed.model(**inputs, output_attentions=True)
    model = copy.deepcopy(composed.model)
    model.vlm.set_attn_implementation("eager")
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    text = composed.model.config.get_text_config()
    assert len(output.hidden_states) == text.num_hidden_layers + 1
    assert len(output.attentions) == text.num_hidden_layers
    plain = composed.model(**inputs, labels=inputs["input_ids"], return_dict=False)
    assert type(plain) is tuple
    torch.testing.assert_close(plain[:2], composed.model(**inputs, labels=inputs["input_ids"]).to_tuple()[:2])
