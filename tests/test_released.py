"""Released checkpoints load by their names: folders, files and hub ids, sharded or not, without a network."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from released_spa3_vlm import FIELDS, make_vlm, write_released
from safetensors.torch import load_file, save_file
from tiny import GOLDEN, GOLDEN_VGGT_FIELDS, golden, golden_inputs

from spa3r import (
    Spa3RForPreTraining,
    Spa3RImageProcessor,
    Spa3RModel,
    Spa3VLMForConditionalGeneration,
    Spa3VLMProcessor,
    VggtModel,
    convert_checkpoint,
)
from spa3r.models.model_card import logger
from spa3r.models.released import find_released
from spa3r.models.spa3_vlm.released_spa3_vlm import translate_spa3_vlm
from spa3r.models.spa3r.released_spa3r import for_pretraining, translate_dinov3, translate_spa3r
from spa3r.models.vggt import released_vggt
from spa3r.models.vggt.released_vggt import vggt_config

MANIFEST = json.loads((GOLDEN / "released_keys.json").read_text())
QWEN_3B = {
    "text_config": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_window_layers": 70,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {
        "hidden_size": 1280,
        "out_hidden_size": 2048,
        "depth": 32,
        "num_heads": 16,
        "intermediate_size": 3420,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "window_size": 112,
    },
    "tie_word_embeddings": True,
}
SIZES = {"backbone_config": GOLDEN_VGGT_FIELDS}


def manifest(name: str, dtype: str, prefix: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of a released file at full size, without its numbers."""
    dtype_ = getattr(torch, dtype)
    return {f"{prefix}{k}": torch.empty(s, dtype=dtype_, device="meta") for k, s in MANIFEST[name][dtype].items()}


def shapes(tensors) -> dict[str, tuple]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


# Full size ------------------------------------------------------------------------------------------------------------


def test_every_key_of_spa3r_ckpt_becomes_a_key_of_the_full_model():
    weights, teacher, config = translate_spa3r(manifest("spa3r.ckpt", "float32", "model."), {})
    with torch.device("meta"):
        model = Spa3RForPreTraining(config)
    assert shapes(for_pretraining(weights, teacher)) == shapes(model.state_dict())
    backbone, dinov3 = config.backbone_config, config.semantic_teacher_config
    assert (config.hidden_size, config.num_latents, config.num_attention_heads) == (768, 256, 12)
    assert (backbone.hidden_size, backbone.num_hidden_layers, backbone.global_qk_norm) == (1024, 24, "rms_norm")
    assert (dinov3.hidden_size, dinov3.num_hidden_layers, dinov3.num_attention_heads) == (1024, 24, 16)
    assert (dinov3.query_bias, dinov3.key_bias, dinov3.value_bias, dinov3.rope_theta) == (True, False, True, 100.0)


def test_every_key_of_spa3_vlm_becomes_a_key_of_the_full_model():
    weights, config = translate_spa3_vlm(manifest("spa3_vlm", "bfloat16"), QWEN_3B, {})
    with torch.device("meta"):
        model = Spa3VLMForConditionalGeneration(config)
    assert shapes(weights) == shapes(model.state_dict())
    assert config.spa3r_config.semantic_teacher_config is None  # only pretraining needs it


# The teacher in its authors' names ------------------------------------------------------------------------------------


def with_authors_teacher() -> dict[str, torch.Tensor]:
    """The golden Spa3R with the golden DINOv3 in its authors' names."""
    teacher = {f"dino.{key}": tensor for key, tensor in golden("dinov3_hub", "weights.").items()}
    return golden("spa3r_asymmetric", "weights.") | teacher


def write_ckpt(file: Path, tensors: dict) -> Path:
    """As PyTorch Lightning writes it."""
    lightning = {
        "epoch": 3,
        "global_step": 9,
        "loops": {},
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
    }
    torch.save(lightning | {"state_dict": {f"model.{key}": tensor for key, tensor in tensors.items()}}, file)
    return file


@pytest.fixture(scope="module")
def spa3r_ckpt(tmp_path_factory):
    return write_ckpt(tmp_path_factory.mktemp("ckpt") / "spa3r.ckpt", with_authors_teacher())


@torch.no_grad()
def assert_golden_teacher(teacher):
    for inputs, outputs in (("pixel_values", "x_norm_patchtokens"), ("small", "small")):
        ours = teacher(pixel_values=golden("dinov3_hub", "inputs.")[inputs]).last_hidden_state[:, 5:]
        reference = golden("dinov3_hub", "outputs.")[outputs]
        assert (ours - reference).norm() / reference.norm() <= 1e-5


@torch.no_grad()
def assert_golden_latents(model):
    latents = model.encode(**golden_inputs("spa3r_asymmetric"))
    reference = golden("spa3r_asymmetric", "outputs.")["predict_latents"]
    assert (latents - reference).norm() / reference.norm() <= 1e-5


def test_the_authors_names_give_the_recorded_features(spa3r_ckpt, tmp_path):
    """Through a pickle as it was released: converted, and loaded as it is. Tensors tell the teacher's sizes."""
    converted = convert_checkpoint(spa3r_ckpt, tmp_path / "ours", "spa3r", {"backbone_config": GOLDEN_VGGT_FIELDS})
    models = [Spa3RForPreTraining.from_pretrained(converted), Spa3RForPreTraining.from_pretrained(spa3r_ckpt, **SIZES)]
    for model in models:
        assert_golden_teacher(model.semantic_teacher)
        assert_golden_latents(model.spa3r)
    states = [model.state_dict() for model in models]
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_the_key_has_no_bias_whatever_number_is_stored():
    tensors = golden("dinov3_hub", "weights.")
    width = tensors["cls_token"].shape[-1]
    bias = tensors["blocks.1.attn.qkv.bias"].clone()
    bias[width : 2 * width] = float("nan")
    weights, config = translate_dinov3(tensors | {"blocks.1.attn.qkv.bias": bias}, {})
    assert not config.key_bias and all(tensor.isfinite().all() for tensor in weights.values())
    unmasked = {key: tensor for key, tensor in tensors.items() if not key.endswith("bias_mask")}
    weights, config = translate_dinov3(unmasked, {})
    assert config.key_bias and "model.layer.1.attention.k_proj.bias" in weights
    plain = {key: tensor for key, tensor in unmasked.items() if not key.endswith("qkv.bias")}
    assert not translate_dinov3(plain, {})[1].query_bias


def test_the_teachers_rotary_base_is_read_and_another_encoding_refused():
    tensors = golden("dinov3_hub", "weights.")
    halved = tensors | {"rope_embed.periods": tensors["rope_embed.periods"].bfloat16()}
    assert translate_dinov3(halved, {})[1].rope_theta == 100.0
    other = tensors | {"rope_embed.periods": 50.0 ** (torch.arange(4) / 4)}
    assert translate_dinov3(other, {})[1].rope_theta == pytest.approx(50, rel=1e-3)
    with pytest.raises(
        ValueError, match=r"`rope_embed\.periods` must be powers of one base, .* got \[1\.0, 2\.0, 3\.0"
    ):
        translate_dinov3(tensors | {"rope_embed.periods": torch.tensor([1.0, 2.0, 3.0, 4.0])}, {})


# By name --------------------------------------------------------------------------------------------------------------

COMMITS = ("a" * 40, "b" * 40)


def publish(cache: Path, repository: str, files: Path, commit: str = COMMITS[0], refs: tuple = ("main",)) -> str:
    """Put a folder into a hub cache, as a download would: blobs, a snapshot of links to them, refs."""
    home = cache / f"models--{repository.replace('/', '--')}"
    for file in sorted(path for path in files.rglob("*") if path.is_file()):
        blob = home / "blobs" / f"{commit[:8]}{abs(hash(str(file.relative_to(files)))):x}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link = home / "snapshots" / commit / file.relative_to(files)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    for ref in refs:
        (home / "refs").mkdir(parents=True, exist_ok=True)
        (home / "refs" / ref).write_text(commit)
    return repository


def shard(folder: Path, count: int = 3) -> None:
    """Cut a folder's model.safetensors into shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-{part + 1:05}-of-{count:05}.safetensors" for part in range(count)]
    for part, name in enumerate(names):
        save_file({k: t for i, (k, t) in enumerate(tensors.items()) if i % count == part}, folder / name)
    index = {"metadata": {"total_size": 1}, "weight_map": {k: names[i % count] for i, k in enumerate(tensors)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module", params=("one file", "shards"))
def hub(request, tmp_path_factory):
    """A hub cache with Spa3-VLM and VGGT-1B in miniature, as they were released."""
    root = tmp_path_factory.mktemp("hub")
    composed, vggt = root / "composed", root / "vggt"
    composed.mkdir()
    vggt.mkdir()
    folder, _ = write_released(composed, processor=True)
    write_ckpt(composed / "spa3r.ckpt", with_authors_teacher())
    tensors = golden("vggt", "weights.") | {"track_head.corr_mlp.fc1.weight": torch.ones(2, 2)}
    save_file(tensors, vggt / "model.safetensors")
    (vggt / "config.json").write_text(json.dumps({"img_size": 70, "patch_size": 14, "embed_dim": 32}))
    if request.param == "shards":
        shard(folder)
        shard(vggt)
    cache = root / "cache"
    publish(cache, "hustvl/Spa3-VLM", composed)
    publish(cache, "facebook/VGGT-1B", vggt)
    return {"cache": cache, "composed": composed, "vggt": vggt}


def same(model, other) -> bool:
    one, two = model.state_dict(), other.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture(scope="module")
def converted(hub, tmp_path_factory):
    """What `spa3r convert` makes of the same files: the models that names must give."""
    root = tmp_path_factory.mktemp("converted")
    sources = {
        "vggt": (hub["vggt"], GOLDEN_VGGT_FIELDS),
        "spa3r": (hub["composed"] / "spa3r.ckpt", SIZES),
        "spa3-vlm": (hub["composed"] / "spa3_vlm", FIELDS),
    }
    return {kind: convert_checkpoint(source, root / kind, kind, f) for kind, (source, f) in sources.items()}


def test_models_load_by_their_names(hub, converted):
    where = {"cache_dir": hub["cache"]}
    for model_class, kind, name, fields in (
        (VggtModel, "vggt", "facebook/VGGT-1B", GOLDEN_VGGT_FIELDS),
        (Spa3RModel, "spa3r", "hustvl/Spa3-VLM", SIZES),
        (Spa3RForPreTraining, "spa3r", "hustvl/Spa3-VLM", SIZES),
        (Spa3VLMForConditionalGeneration, "spa3-vlm", "hustvl/Spa3-VLM", FIELDS),
    ):
        reference = model_class.from_pretrained(converted[kind])
        local = {"vggt": hub["vggt"]}.get(kind, hub["composed"])
        for source, hub_kwargs in ((name, where), (local, {})):
            model, info = model_class.from_pretrained(source, **hub_kwargs, **fields, output_loading_info=True)
            assert type(model) is model_class and same(model, reference) and not model.training
            assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
            assert model.config.name_or_path == str(source)
            volatile = ("_name_or_path", "transformers_version", "architectures", "dtype")
            ours, theirs = (
                {k: v for k, v in m.config.to_diff_dict().items() if k not in volatile} for m in (model, reference)
            )
            if kind != "spa3-vlm":  # whose parts name their files
                assert ours == theirs
    assert model.generation_config.max_new_tokens == 3


def test_loading_weights_without_commercial_use_says_so_once(hub, caplog):
    logger.warning_once.__func__.cache_clear()  # other tests load the same name
    for _ in range(2):
        VggtModel.from_pretrained("facebook/VGGT-1B", cache_dir=hub["cache"], **GOLDEN_VGGT_FIELDS)
    VggtModel.from_pretrained(hub["vggt"], **GOLDEN_VGGT_FIELDS)  # a folder may hold the commercial variant
    said = [record.message for record in caplog.records if "commercially" in record.message]
    assert said == ["The weights of facebook/VGGT-1B may not be used commercially (license: cc-by-nc-4.0)."]


def test_other_forms_of_the_same_files(hub, converted):
    """A single file, the folder inside, `subfolder`, the Spa3R inside a whole Spa3-VLM."""
    folder, where = hub["composed"] / "spa3_vlm", {"cache_dir": hub["cache"]}
    reference = Spa3VLMForConditionalGeneration.from_pretrained(converted["spa3-vlm"])
    for source, kwargs in ((folder, {}), ("hustvl/Spa3-VLM", where | {"subfolder": "spa3_vlm"})):
        assert same(Spa3VLMForConditionalGeneration.from_pretrained(source, **kwargs, **FIELDS), reference)
    assert same(Spa3RModel.from_pretrained(folder, **SIZES), reference.spa3r)
    spa3r = Spa3RModel.from_pretrained(hub["composed"] / "spa3r.ckpt", **SIZES)
    assert same(spa3r, Spa3RModel.from_pretrained(converted["spa3r"]))
    assert_golden_latents(spa3r)
    if (weights := hub["vggt"] / "model.safetensors").is_file():
        reference = VggtModel.from_pretrained(converted["vggt"])
        assert same(VggtModel.from_pretrained(weights, **GOLDEN_VGGT_FIELDS), reference)
        config = reference.config
        assert same(VggtModel.from_pretrained(weights, config=config), reference)


def test_processors_load_by_their_names(hub):
    where = {"cache_dir": hub["cache"]}
    sources = [("facebook/VGGT-1B", where), ("hustvl/Spa3-VLM", where), (hub["composed"] / "spa3_vlm", {})]
    for source, kwargs in [*sources, (hub["composed"] / "spa3r.ckpt", {})]:
        processor = Spa3RImageProcessor.from_pretrained(source, mode="pad", **kwargs)
        assert (processor.size, processor.patch_size, processor.mode) == (70, 14, "pad")
    for source, kwargs in (("hustvl/Spa3-VLM", where), (hub["composed"], {}), (hub["composed"] / "spa3_vlm", {})):
        processor = Spa3VLMProcessor.from_pretrained(source, image_mode="native", **kwargs)
        assert processor.view_image_processor.size == 70 and processor.image_mode == "native"
        assert (
            processor.image_token_id
            == json.loads((hub["composed"] / "spa3_vlm/config.json").read_text())["image_token_id"]
        )
        assert processor.chat_template is not None


def test_a_new_revision_is_loaded_and_the_old_one_stays(hub, tmp_path):
    for commit, value in zip(COMMITS, (1.0, 2.0)):
        files = tmp_path / commit[0]
        files.mkdir()
        tensors = golden("vggt", "weights.")
        tensors["aggregator.camera_token"] = torch.full_like(tensors["aggregator.camera_token"], value)
        save_file(tensors, files / "model.safetensors")
        publish(tmp_path / "cache", "someone/vggt", files, commit, refs=("main",))
        model = VggtModel.from_pretrained("someone/vggt", cache_dir=tmp_path / "cache", **GOLDEN_VGGT_FIELDS)
        assert (model.camera_token == value).all()
    old = VggtModel.from_pretrained(
        "someone/vggt", cache_dir=tmp_path / "cache", revision=COMMITS[0], **GOLDEN_VGGT_FIELDS
    )
    assert (old.camera_token == 1).all()


def test_parts_that_configurations_name_may_be_released(hub, converted, tmp_path, monkeypatch):
    """A Spa3R without its backbone, a composed combined by names, pretraining on a named backbone."""
    model = Spa3RModel.from_pretrained(converted["spa3r"])
    model.config.backbone_name_or_path = str(hub["composed"] / "spa3r.ckpt")
    # Names alone say the sizes of the full models only.
    monkeypatch.setattr(released_vggt, "vggt_config", lambda weights, _: vggt_config(weights, GOLDEN_VGGT_FIELDS))
    model.save_pretrained(tmp_path / "light", include_backbone=False)
    assert same(Spa3RModel.from_pretrained(tmp_path / "light"), model)
    pretraining = Spa3RForPreTraining.from_backbone_and_dinov3(
        "facebook/VGGT-1B", targets=("geometry",), cache_dir=hub["cache"]
    )
    assert pretraining.spa3r.config.backbone_name_or_path == "facebook/VGGT-1B"
    combined = Spa3VLMForConditionalGeneration.from_vlm_and_spa3r(make_vlm(), hub["composed"] / "spa3r.ckpt")
    assert same(combined.spa3r, model)


def test_placement_precision_and_saving_work_as_with_any_checkpoint(hub, converted, tmp_path):
    arguments = {"dtype": torch.bfloat16, "device_map": "cpu", "attn_implementation": "sdpa"}
    model = Spa3VLMForConditionalGeneration.from_pretrained(hub["composed"], **arguments, **FIELDS)
    reference = Spa3VLMForConditionalGeneration.from_pretrained(converted["spa3-vlm"], **arguments)
    assert same(model, reference)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert dtypes == {name: tensor.dtype for name, tensor in reference.state_dict().items()}
    model.save_pretrained(tmp_path)
    assert same(Spa3VLMForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16), model)


# Refusals -------------------------------------------------------------------------------------------------------------


def test_another_kind_is_named(hub):
    composed = hub["composed"]
    for model_class, source, words in (
        (
            VggtModel,
            composed / "spa3r.ckpt",
            r"ckpt holds a Spa3R in its released layout, and VggtModel expects a VGGT",
        ),
        (
            Spa3RModel,
            hub["vggt"],
            r"holds a VGGT .*expects a Spa3R or a Spa3-VLM\. Load it with VggtModel",
        ),
        (Spa3VLMForConditionalGeneration, hub["vggt"], r"holds a VGGT in its released layout, and Spa3VLMFor"),
        (Spa3VLMForConditionalGeneration, composed / "spa3r.ckpt", r"holds a Spa3R .*Load it with Spa3RModel"),
    ):
        with pytest.raises(ValueError, match=words):
            model_class.from_pretrained(source)


def test_what_is_no_released_checkpoint_is_left_to_transformers(hub, converted, tmp_path):
    assert find_released(converted["vggt"], ("vggt",), "test") is None
    assert find_released("nobody/nothing", ("vggt",), "test", cache_dir=tmp_path) is None
    with pytest.raises(OSError):
        VggtModel.from_pretrained("nobody/nothing", cache_dir=tmp_path)
    make_vlm().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="holds a model of type 'qwen2_5_vl', and Spa3VLMForConditional"):
        Spa3VLMForConditionalGeneration.from_pretrained(tmp_path / "plain")
    save_file({"something.weight": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors is a file in an unknown layout, not a released one"):
        VggtModel.from_pretrained(tmp_path / "x.safetensors")


def test_damaged_and_incomplete_files_are_named(hub, tmp_path):
    shutil.copytree(hub["composed"], tmp_path / "composed")
    ckpt = tmp_path / "composed" / "spa3r.ckpt"
    ckpt.write_bytes(ckpt.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"spa3r\.ckpt can't be read: only pickles of tensors"):
        Spa3RModel.from_pretrained(tmp_path / "composed")
    files = sorted((tmp_path / "composed" / "spa3_vlm").glob("*.safetensors"))
    if len(files) > 1:
        files[1].unlink()
        error, words = FileNotFoundError, rf"names 3 files of weights, and {files[1].name} are missing"
    else:
        files[0].write_bytes(files[0].read_bytes()[:-50])
        error, words = ValueError, r"safetensors can't be read as safetensors .*truncated or damaged"
    with pytest.raises(error, match=words):
        Spa3VLMForConditionalGeneration.from_pretrained(tmp_path / "composed", **FIELDS)
    tensors = golden("vggt", "weights.")
    del tensors["aggregator.camera_token"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors lacks keys of VggtModel: camera_token"):
        VggtModel.from_pretrained(tmp_path / "model.safetensors", **GOLDEN_VGGT_FIELDS)


# Commands -------------------------------------------------------------------------------------------------------------


def test_commands_take_released_names(hub, tmp_path, monkeypatch):
    """`ask`, `encode` and `eval` load the Spa3-VLM, not the plain VLM that its folder also looks like."""
    from spa3r.cli.encode import _load_spa3r
    from spa3r.cli.eval import _load_any_vlm
    from spa3r.console import Dtype, load_vlm

    monkeypatch.setattr(released_vggt, "vggt_config", lambda weights, _: vggt_config(weights, GOLDEN_VGGT_FIELDS))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub["cache"]))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(hub["cache"]))
    for name in ("hustvl/Spa3-VLM", str(hub["composed"] / "spa3_vlm")):
        for load in (load_vlm, _load_any_vlm):
            model, processor = load(name, "cpu", Dtype.auto, None)
            assert type(model) is Spa3VLMForConditionalGeneration and type(processor) is Spa3VLMProcessor
    for name in ("hustvl/Spa3-VLM", str(hub["composed"] / "spa3r.ckpt"), str(hub["composed"] / "spa3_vlm")):
        model, processor = _load_spa3r(name, "cpu", Dtype.auto, None)
        assert type(model) is Spa3RModel and processor.size == 70
    with pytest.raises(ValueError, match=r"holds a VGGT in its released layout, and `--model` expects a Spa3R"):
        _load_spa3r(str(hub["vggt"]), "cpu", Dtype.auto, None)


# Adapter folders ------------------------------------------------------------------------------------------------------


def test_adapter_folders_load_and_merge(tmp_path):
    """A peft checkpoint over a Spa3-VLM: by from_pretrained, `--model` and `spa3r merge`, with one result."""
    from peft import LoraConfig, get_peft_model
    from typer.testing import CliRunner

    from spa3r.checkpoints import SPA3_VLM
    from spa3r.cli.eval import _load_any_vlm
    from spa3r.cli.main import app
    from spa3r.console import Dtype, load_vlm

    base = Spa3VLMForConditionalGeneration.from_pretrained(SPA3_VLM)
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["adapter"])
    low_rank = get_peft_model(base, lora)
    for parameter in low_rank.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.05)
    folder = tmp_path / "adapter"
    low_rank.save_pretrained(folder)
    Spa3VLMProcessor.from_pretrained(SPA3_VLM).save_pretrained(folder)
    inputs = {"input_ids": torch.arange(5, 25)[None], "attention_mask": torch.ones(1, 20, dtype=torch.long)}
    with torch.no_grad():
        reference = low_rank.eval()(**inputs).logits
        loaded = Spa3VLMForConditionalGeneration.from_pretrained(folder)
        assert type(loaded) is Spa3VLMForConditionalGeneration and not loaded.training
        torch.testing.assert_close(loaded(**inputs).logits, reference, rtol=1e-4, atol=1e-4)
        for load in (load_vlm, _load_any_vlm):
            model, processor = load(str(folder), "cpu", Dtype.auto, None)
            assert type(processor) is Spa3VLMProcessor
            torch.testing.assert_close(model(**inputs).logits, reference, rtol=1e-4, atol=1e-4)
        told = CliRunner().invoke(app, ["merge", str(folder), str(tmp_path / "merged")])
        assert told.exit_code == 0, told.output
        merged = Spa3VLMForConditionalGeneration.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(**inputs).logits, reference, rtol=1e-4, atol=1e-4)
    again = CliRunner().invoke(app, ["merge", str(folder), str(tmp_path / "merged")])
    assert again.exit_code == 1 and "must be a new or an empty folder" in again.output

    tensors = load_file(folder / "adapter_model.safetensors")
    key = next(key for key in tensors if "lora_A" in key)
    save_file({name: value for name, value in tensors.items() if name != key}, folder / "adapter_model.safetensors")
    with pytest.raises(
        ValueError, match=r"The adapter .* lacks keys of Spa3VLM.*q_proj.*: take adapter and base model"
    ):
        Spa3VLMForConditionalGeneration.from_pretrained(folder)
    told = CliRunner().invoke(app, ["merge", str(folder), str(tmp_path / "other")])
    assert told.exit_code == 1 and "lacks keys of Spa3VLM" in " ".join(told.output.split())
    save_file(tensors | {key.replace("q_proj", "z_proj"): tensors[key].clone()}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"The adapter .* has unexpected keys of Spa3VLM.*z_proj"):
        Spa3VLMForConditionalGeneration.from_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors")

    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="holds a PEFT adapter that doesn't name its base model"):
        Spa3VLMForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("own_processor", [True, False])
def test_adapters_on_the_hub_load_and_merge_without_a_network(tmp_path, monkeypatch, own_processor):
    """An adapter's repository and that of its base model, at the revision that the adapter names, in a hub cache."""
    from peft import LoraConfig, get_peft_model
    from typer.testing import CliRunner

    from spa3r.checkpoints import SPA3_VLM
    from spa3r.cli.eval import _load_any_vlm
    from spa3r.cli.main import app
    from spa3r.console import Dtype, load_vlm

    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for place in (
        "huggingface_hub.constants",
        "transformers.utils.hub.constants",
        "huggingface_hub.file_download.constants",
    ):
        monkeypatch.setattr(f"{place}.HF_HUB_CACHE", str(cache))
    publish(cache, "someone/place", SPA3_VLM, COMMITS[0], refs=("v1",))
    base = Spa3VLMForConditionalGeneration.from_pretrained("someone/place", revision="v1")
    low_rank = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["adapter"], revision="v1")
    )
    for parameter in low_rank.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.05)
    folder = tmp_path / "adapter"
    low_rank.save_pretrained(folder)
    if own_processor:
        Spa3VLMProcessor.from_pretrained(SPA3_VLM).save_pretrained(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/place"
    name = publish(cache, "someone/place-lora", folder, COMMITS[1])
    inputs = {"input_ids": torch.arange(5, 25)[None], "attention_mask": torch.ones(1, 20, dtype=torch.long)}
    with torch.no_grad():
        reference = low_rank.eval()(**inputs).logits
        loaded = Spa3VLMForConditionalGeneration.from_pretrained(name)
        torch.testing.assert_close(loaded(**inputs).logits, reference, rtol=1e-4, atol=1e-4)
        for load in (load_vlm, _load_any_vlm):
            for given in (name, str(folder)):
                model, processor = load(given, "cpu", Dtype.auto, None)
                assert type(processor) is Spa3VLMProcessor
                torch.testing.assert_close(model(**inputs).logits, reference, rtol=1e-4, atol=1e-4)
        told = CliRunner().invoke(app, ["merge", name, str(tmp_path / "merged")])
        assert told.exit_code == 0, told.output
        merged = Spa3VLMForConditionalGeneration.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(**inputs).logits, reference, rtol=1e-4, atol=1e-4)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"holds an adapter_config\.json that can't be read .* save it again"):
        Spa3VLMForConditionalGeneration.from_pretrained(folder)
