"""The dtype of a model on a CPU, int8 layers and compiled layers."""

import copy
from pathlib import Path

import pytest
import torch
from command_line import run, said
from media import noise
from safetensors.torch import load_file
from tiny_spa3_vlm import PICTURES, Composed, prompt

from spa3r import Spa3RModel, Spa3VLM
from spa3r.console import Dtype, compile_spa3r, in_int8, load_vlm
from spa3r.models import precision
from spa3r.models.precision import Int8Linear, cast, compile_layers, cpu_has_bfloat16, set_cpu_dtype, use_int8_layers
from spa3r.models.spa3_vlm.fingerprints import model_fingerprint
from spa3r.rooms.embedded import embedded_model


@pytest.fixture(scope="module")
def embedded(tmp_path_factory) -> tuple[Composed, str]:
    composed = Composed(*embedded_model())
    folder = tmp_path_factory.mktemp("precision") / "model"
    composed.model.save_pretrained(folder)
    composed.processor.save_pretrained(folder)
    return composed, str(folder)


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.fixture
def another_cpu(monkeypatch):
    """Sets the instructions of the CPU, and the size from which a model is large."""

    def pretend(*instructions: str, large: int = 10**8) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(instructions, True), raising=False)
        monkeypatch.setattr(precision, "REAL_SIZE", large)
        cpu_has_bfloat16.cache_clear()

    yield pretend
    cpu_has_bfloat16.cache_clear()


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux tells the instructions")
def test_the_instructions_are_those_of_linux(monkeypatch):
    words = Path("/proc/cpuinfo").read_text().split()
    wanted = any(name in words for name in precision.BFLOAT16_INSTRUCTIONS)
    for _ in range(2):  # second, as with a PyTorch that doesn't tell them
        cpu_has_bfloat16.cache_clear()
        assert cpu_has_bfloat16() == wanted
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    cpu_has_bfloat16.cache_clear()


@pytest.mark.parametrize(
    ("instructions", "large", "saved", "wanted", "reason"),
    [
        (("avx2", "avx512_bf16"), 10**6, torch.float32, torch.bfloat16, "runs in bfloat16: this CPU has instructions"),
        (("bf16",), 10**6, torch.float16, torch.bfloat16, "billion parameters"),
        (("avx2", "amx_bf16"), 10**8, torch.float32, torch.float32, None),
        (("avx2",), 10**8, torch.float32, torch.float32, None),
        (("avx2",), 10**6, torch.float32, torch.float32, "runs in float32: as it was saved; this CPU has no"),
        (("avx2",), 10**8, torch.bfloat16, torch.float32, "in float32: this CPU has no instructions for bfloat16"),
    ],
)
def test_the_cpu_and_the_size_decide(embedded, another_cpu, instructions, large, saved, wanted, reason):
    another_cpu(*instructions, large=large)
    model = copy.deepcopy(embedded[0].model)
    cast(model, saved)
    told = set_cpu_dtype(model)
    assert (told is None) == (reason is None) and (reason or "") in (told or "")
    for part in (model.vlm, model.adapter, model.spa3r.encoder, model.spa3r.backbone):
        assert {parameter.dtype for parameter in part.parameters()} - {torch.float32} <= {wanted}
    assert {p.dtype for p in model.spa3r.backbone.camera_head.parameters()} == {torch.float32}
    assert model.dtype == wanted


def test_a_cast_model_is_the_one_that_is_loaded_in_the_dtype(embedded):
    composed, folder = embedded
    model = copy.deepcopy(composed.model)
    cast(model, torch.bfloat16)
    loaded = Spa3VLM.from_pretrained(folder, dtype=torch.bfloat16)
    for got, wanted in (
        (model.named_parameters(), loaded.named_parameters()),
        (model.named_buffers(), loaded.named_buffers()),
    ):
        got, wanted = dict(got), dict(wanted)
        assert got.keys() == wanted.keys()
        assert all(got[name].dtype == wanted[name].dtype and torch.equal(got[name], wanted[name]) for name in wanted)


def test_commands_say_the_dtype_and_the_option_overrides_it(embedded, another_cpu, tmp_path):
    _, folder = embedded
    another_cpu("avx512_bf16", large=10**6)
    told: list[str] = []
    assert load_vlm(folder, "cpu", Dtype.auto, None, told.append)[0].dtype == torch.bfloat16
    assert "bfloat16: this CPU has instructions for it" in told[0] and "`--dtype` overrides" in told[0]
    assert load_vlm(folder, "cpu", Dtype.float32, None, told.append)[0].dtype == torch.float32 and len(told) == 1
    another_cpu("avx2", large=10**6)
    noise(60, 40, 0).save(tmp_path / "a.png")
    result = run("encode", tmp_path / "a.png", "--model", folder, "-o", tmp_path / "z.safetensors")
    assert "runs in float32: as it was saved; this CPU has no instructions for bfloat16" in said(result)


def test_commands_run_the_backbone_in_int8(embedded, tmp_path):
    _, folder = embedded
    noise(60, 40, 0).save(tmp_path / "a.png")
    latents = []
    for name, options in (("exact", ()), ("int8", ("--int8",))):
        file = tmp_path / f"{name}.safetensors"
        run("encode", tmp_path / "a.png", "--model", folder, "-o", file, *options)
        latents.append(load_file(file)["latents"])
    assert 0 < relative_error(latents[1], latents[0]) < 0.1
    model, _ = load_vlm(folder, "cpu", Dtype.auto, None, int8=True)
    assert any(isinstance(module, Int8Linear) for module in model.spa3r.backbone.modules())
    with pytest.raises(ValueError, match=r"`--int8` must be left out with a model that has no backbone of a Spa3R"):
        in_int8(None)
    with pytest.raises(ValueError, match=r"`--int8` needs `--device cpu`, got meta"):
        in_int8(Spa3RModel.from_pretrained("embedded").to("meta"))


# int8 layers ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_int8_layers_of_the_backbone(embedded, tmp_path):
    composed, _ = embedded
    model = copy.deepcopy(composed.model)
    backbone = model.spa3r.backbone
    assert use_int8_layers(backbone) == sum(isinstance(module, Int8Linear) for module in model.modules()) > 8
    assert not any(
        isinstance(module, Int8Linear) for part in (model.vlm, backbone.camera_head) for module in part.modules()
    )
    inputs = prompt(composed)
    assert 0 < relative_error(model(**inputs).logits, composed.model(**inputs).logits) < 0.1
    views = composed.processor.view_image_processor(PICTURES)
    got, wanted = (each.spa3r.encode(**views) for each in (model, composed.model))
    assert 0 < relative_error(got, wanted) < 0.1
    assert model_fingerprint(model) != model_fingerprint(composed.model)
    with pytest.raises(ValueError, match=r"holds int8 weights.* Save the model before `use_int8_layers`, or with inc"):
        model.save_pretrained(tmp_path)
    model.spa3r.config.backbone_name_or_path = str(tmp_path / "backbone")
    composed.model.spa3r.backbone.save_pretrained(tmp_path / "backbone")
    model.spa3r.save_pretrained(tmp_path / "rest", include_backbone=False)
    loaded = Spa3RModel.from_pretrained(tmp_path / "rest")
    torch.testing.assert_close(loaded.encode(**views), wanted)


def test_int8_layers_that_are_refused(embedded, tmp_path):
    composed, _ = embedded
    backbone = copy.deepcopy(composed.model.spa3r.backbone)
    with pytest.raises(ValueError, match=r"need the weights in the CPU's memory, and they are on meta.*`device_map`"):
        use_int8_layers(backbone.to("meta"))
    backbone.hf_quantizer = object()
    with pytest.raises(ValueError, match=r"made from unquantized ones, and the model is quantized"):
        use_int8_layers(backbone)
    layer = Int8Linear(torch.nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"run on the CPU only, and `tokens` are on meta"):
        layer(torch.zeros(2, 8, device="meta"))


# Compiled layers ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
def test_compiled_layers_take_any_lengths_without_compiling_again(embedded):
    composed, _ = embedded
    model = copy.deepcopy(composed.model.spa3r)
    torch._dynamo.reset()
    before = model.state_dict().keys()
    assert compile_layers(model, backend="aot_eager") > 4 and model.state_dict().keys() == before
    counters = torch._dynamo.utils.counters
    counters.clear()
    graphs = []
    for count in (2, 3, 1):
        views = composed.processor.view_image_processor(PICTURES[:count])
        assert relative_error(model.encode(**views), composed.model.spa3r.encode(**views)) < 1e-5
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] == graphs[2] > 0


@pytest.mark.slow
def test_commands_run_compiled_layers(embedded, tmp_path):
    _, folder = embedded
    noise(60, 40, 0).save(tmp_path / "a.png")
    latents = []
    for name, options in (("exact", ()), ("compiled", ("--compile",))):
        file = tmp_path / f"{name}.safetensors"
        run("encode", tmp_path / "a.png", "--model", folder, "-o", file, *options)
        latents.append(load_file(file)["latents"])
    assert relative_error(latents[1], latents[0]) < 1e-4


def test_compiling_needs_a_spa3r_and_a_compiler(embedded, monkeypatch):
    with pytest.raises(ValueError, match=r"`--compile` must be left out with a model that has no Spa3R"):
        compile_spa3r(None)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler, and no-such-compiler is not installed.*CXX"):
        compile_spa3r(embedded[0].model.spa3r)
