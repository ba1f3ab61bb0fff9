"""The converter: what it reads, infers and refuses. That it computes the same is shown by the models' golden tests."""

import json
import re
import shutil
from fractions import Fraction

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import GOLDEN_SPA3R_FIELDS, GOLDEN_VGGT_FIELDS, golden, golden_inputs, released_checkpoints
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from spa3r import Spa3RForPreTraining, Spa3RImageProcessor, Spa3RModel, VggtConfig, VggtModel, convert_checkpoint
from spa3r.conversion import read_checkpoint


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return released_checkpoints(tmp_path_factory.mktemp("released") / "files")


def vggt_weights() -> dict:
    return golden("vggt", "weights.")


def spa3r_weights() -> dict:
    return golden("spa3r_asymmetric", "weights.")


@pytest.mark.parametrize("pair", (("vggt-folder", "vggt-pt"), ("spa3r-ckpt", "spa3r-safetensors")))
def test_every_layout_gives_the_same_checkpoint(pair, golden_folders):
    one, other = (load_file(golden_folders[layout] / "model.safetensors") for layout in pair)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    configs = [json.loads((golden_folders[layout] / "config.json").read_text()) for layout in pair]
    assert configs[0] == configs[1]


def test_a_file_a_folder_and_shards_are_read_alike(released, tmp_path):
    weights = vggt_weights()
    names = sorted(weights)
    for part in range(3):
        save_file({n: weights[n] for n in names[part::3]}, tmp_path / f"model-{part + 1:05d}-of-00003.safetensors")
    sources = (tmp_path, released["vggt-folder"], released["vggt-folder"] / "model.safetensors", released["vggt-pt"])
    for source in sources:
        tensors = read_checkpoint(source)
        assert tensors.keys() - {"track_head.corr_mlp.fc1.weight"} == weights.keys()
        assert all(torch.equal(tensors[name], weights[name]) for name in names)


def test_a_pickle_of_the_old_form_is_read(tmp_path):
    weights = vggt_weights()
    torch.save(weights, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    read = read_checkpoint(tmp_path / "model.pt")
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[key], weights[key]) for key in weights)


def test_sizes_are_read_off_the_tensors(golden_folders):
    config = AutoConfig.from_pretrained(golden_folders["vggt-folder"])
    sizes = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.patch_size)
    assert sizes == (32, 4, 2, 14) and config.image_size == 70
    assert (config.patch_embedding_num_layers, config.camera_num_layers, config.mlp_ratio) == (2, 2, 4)
    assert (list(config.dpt_channels), config.dpt_features) == ([8, 16, 24, 32], 16)
    assert list(config.heads) == ["camera", "depth", "point"] and config.num_register_tokens == 4
    config = AutoConfig.from_pretrained(golden_folders["spa3r-ckpt"])
    sizes = (config.hidden_size, config.num_attention_heads, config.num_latents, config.num_register_tokens)
    assert sizes == (48, 3, 8, 4)
    assert (config.num_encoder_layers, config.num_decoder_layers, config.mlp_ratio) == (2, 2, 4)
    teacher = config.semantic_teacher_config
    assert (teacher.model_type, teacher.hidden_size, teacher.num_hidden_layers) == ("dinov3_vit", 32, 2)
    assert (teacher.patch_size, teacher.intermediate_size, teacher.num_register_tokens) == (16, 64, 4)
    assert config.semantic_hidden_size == 32 and config.backbone_name_or_path is None


@pytest.mark.parametrize("layout, norm", (("vggt-folder", "layer_norm"), ("spa3r-ckpt", "rms_norm")))
def test_the_norm_of_global_layers_is_chosen_from_the_keys(layout, norm, golden_folders):
    config = AutoConfig.from_pretrained(golden_folders[layout])
    assert getattr(config, "backbone_config", config).global_qk_norm == norm


@pytest.mark.parametrize("claimed", ("layer_norm", "rms_norm"))
def test_the_keys_overrule_a_wrong_claim_about_the_norm(claimed, released, tmp_path):
    fields = GOLDEN_VGGT_FIELDS | {"global_qk_norm": claimed}
    folder = convert_checkpoint(released["vggt-folder"], tmp_path, "vggt", fields)
    assert AutoConfig.from_pretrained(folder).global_qk_norm == "layer_norm"


def test_a_whole_configuration_is_taken_as_well(released, golden_folders, tmp_path):
    config = AutoConfig.from_pretrained(golden_folders["vggt-folder"])
    assert type(config) is VggtConfig
    convert_checkpoint(released["vggt-pt"], tmp_path, "vggt", config)
    again, before = (json.loads((f / "config.json").read_text()) for f in (tmp_path, golden_folders["vggt-folder"]))
    assert again == before


@pytest.mark.parametrize("layout", ("vggt-folder", "spa3r-ckpt"))
def test_output_is_whole_model_configuration_and_processor(layout, golden_folders):
    folder = golden_folders[layout]
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= {file.name for file in folder.iterdir()}
    model = AutoModel.from_pretrained(folder)
    assert type(model) is (VggtModel if "vggt" in layout else Spa3RModel)
    processor = AutoImageProcessor.from_pretrained(folder)
    assert type(processor) is Spa3RImageProcessor and processor.patch_size == 14


def test_without_the_teacher_a_checkpoint_is_a_spa3r_model(tmp_path):
    save_file(spa3r_weights(), tmp_path / "spa3r.safetensors")
    folder = convert_checkpoint(tmp_path / "spa3r.safetensors", tmp_path / "ours", "spa3r", GOLDEN_SPA3R_FIELDS)
    model = Spa3RModel.from_pretrained(folder)
    with torch.no_grad():
        latents = model.encode(**golden_inputs("spa3r_asymmetric"))
    reference = golden("spa3r_asymmetric", "outputs.")["predict_latents"]
    assert (latents - reference).norm() / reference.norm() <= 1e-5
    with pytest.raises(ValueError, match="semantic_teacher_config"):
        Spa3RForPreTraining.from_pretrained(folder)


@pytest.mark.parametrize("heads", (["camera"], ["camera", "depth"], []))
def test_a_vggt_without_some_heads_is_converted_without_them(heads, tmp_path):
    absent = tuple(f"{head}_head." for head in {"camera", "depth", "point"} - set(heads))
    save_file({k: v for k, v in vggt_weights().items() if not k.startswith(absent)}, tmp_path / "model.safetensors")
    folder = convert_checkpoint(tmp_path / "model.safetensors", tmp_path / "ours", "vggt", GOLDEN_VGGT_FIELDS)
    assert list(VggtModel.from_pretrained(folder).config.heads) == heads


# Refusals -------------------------------------------------------------------------------------------------------------


def converted(weights: dict, kind: str, folder, fields=None):
    save_file(weights, folder / "model.safetensors")
    fields = fields or {"vggt": GOLDEN_VGGT_FIELDS, "spa3r": GOLDEN_SPA3R_FIELDS}[kind]
    return convert_checkpoint(folder / "model.safetensors", folder / "ours", kind, fields)


def without(weights: dict, *patterns: str) -> dict:
    return {key: tensor for key, tensor in weights.items() if not any(re.search(p, key) for p in patterns)}


@pytest.mark.parametrize(
    "kind, dropped, words",
    [
        ("vggt", r"frame_blocks\.1\.mlp\.fc1\.bias", r"lacks keys \(in our names\): frame_layers\.1\.mlp\.fc1\.bias\."),
        ("vggt", r"pos_embed", r"lacks keys .*: patch_embedding\.position_embedding\."),
        ("vggt", r"depth_head\.scratch\.layer2_rn", r"lacks keys .*depth_head\.laterals\.1\.weight"),
        ("vggt", r"camera_head\.trunk\.0\.norm1", r"lacks keys .*: camera_head\.layers\.0\.norm1\.bias, camera_head\."),
        ("vggt", r"frame_blocks", r"lacks keys .*frame_layers\.0"),
        ("spa3r", r"query_embed", r"lacks keys .*: encoder\.query_tokens\."),
        ("spa3r", r"^decoder\.norm", r"lacks keys .*: decoder\.norm\.bias, decoder\.norm\.weight\."),
        ("spa3r", r"^encoder\.blocks", r"lacks keys .*encoder\.layers\.0"),
        ("spa3r", r"^aggregator", r"lacks keys .*patch_embedding\.projection\.weight.*incomplete, or `kind` is wrong"),
        ("spa3r", r"heads\.sem\.fc1", r"lacks keys .*semantic_head\.fc1"),
    ],
)  # fmt: skip
def test_missing_keys_are_named(kind, dropped, words, tmp_path):
    weights = without({"vggt": vggt_weights, "spa3r": spa3r_weights}[kind](), dropped)
    with pytest.raises(ValueError, match=words):
        converted(weights, kind, tmp_path)


def test_a_teacher_that_lacks_keys_is_refused(tmp_path):
    teacher = {f"dino.{key}": tensor for key, tensor in golden("spa3r_asymmetric", "teacher.").items()}
    for dropped, words in ((r"layer\.1\.norm1\.weight", "norm1.weight"), (r"register_tokens", "register_tokens")):
        with pytest.raises(ValueError, match=rf"lacks keys .*{words}"):
            converted(without(spa3r_weights() | teacher, dropped), "spa3r", tmp_path)


@pytest.mark.parametrize("kind", ("vggt", "spa3r"))
def test_foreign_keys_are_named(kind, tmp_path):
    weights = {"vggt": vggt_weights, "spa3r": spa3r_weights}[kind]()
    strangers = {f"stranger.{index}": torch.ones(1) for index in range(10)}
    words = r"keys that the converter doesn't know: stranger\.0, .*stranger\.7 and 2 more\..*check that `kind` names"
    with pytest.raises(ValueError, match=words):
        converted(weights | strangers, kind, tmp_path)


def test_known_keys_beyond_the_model_are_named(tmp_path):
    fields = GOLDEN_VGGT_FIELDS | {"num_hidden_layers": 3, "dpt_layers": [0, 1, 2, 2]}
    with pytest.raises(ValueError, match=r"has keys that VggtModel lacks: frame_layers\.3\."):
        converted(vggt_weights(), "vggt", tmp_path, fields)


def test_tensors_of_other_shapes_are_named(tmp_path):
    weights = vggt_weights()
    weights["aggregator.frame_blocks.1.attn.proj.bias"] = torch.ones(7)
    words = r"tensors of other shapes: frame_layers\.1\.attention\.proj\.bias \(7,\), wanted \(32,\)\. Check `config`"
    with pytest.raises(ValueError, match=words):
        converted(weights, "vggt", tmp_path)


@pytest.mark.parametrize("kind, wrong", (("vggt", "spa3r-safetensors"), ("spa3r", "vggt-folder")))
def test_the_wrong_kind_is_refused(kind, wrong, released, tmp_path):
    with pytest.raises(ValueError, match=r"check that `kind` names the right one|or `kind` is wrong"):
        convert_checkpoint(released[wrong], tmp_path, kind, GOLDEN_SPA3R_FIELDS if kind == "spa3r" else None)


def test_an_unknown_kind_is_refused(released, tmp_path):
    kinds = "'vggt', 'depth-anything-3', 'spa3r', 'spa3-vlm'"
    with pytest.raises(ValueError, match=rf"`kind` must be one of {kinds}, got 'dust3r'"):
        convert_checkpoint(released["vggt-pt"], tmp_path, "dust3r")


def test_an_absent_source_is_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"`source` must be a checkpoint file or folder, and .*nowhere doesn't exist"
    ):
        convert_checkpoint(tmp_path / "nowhere", tmp_path / "ours", "vggt")
    with pytest.raises(FileNotFoundError, match=r"`source` must hold weights \(\*\.safetensors, .*holds none"):
        convert_checkpoint(tmp_path, tmp_path / "ours", "vggt")


@pytest.mark.parametrize("layout", ("vggt-folder", "vggt-pt", "spa3r-ckpt"))
@pytest.mark.parametrize("share", (0.0, 0.001, 0.5, 0.999))
def test_truncated_files_are_refused(layout, share, released, tmp_path):
    source = released[layout] if released[layout].is_file() else released[layout] / "model.safetensors"
    file = tmp_path / source.name
    file.write_bytes(source.read_bytes()[: int(source.stat().st_size * Fraction(share))])
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))} can't be read"):
        convert_checkpoint(file, tmp_path / "ours", layout.partition("-")[0])
    assert not (tmp_path / "ours").exists()


class Surprise:
    """What an attacker would put into a pickle: code that runs while it is read."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (shutil.rmtree, (str(self.file),))


def test_a_pickle_of_anything_but_tensors_is_refused_and_not_run(tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    torch.save({"state_dict": vggt_weights(), "callback": Surprise(victim)}, tmp_path / "model.ckpt")
    words = "only pickles of tensors and plain values are loaded, and they must be complete"
    with pytest.raises(ValueError, match=words):
        convert_checkpoint(tmp_path / "model.ckpt", tmp_path / "ours", "vggt", GOLDEN_VGGT_FIELDS)
    assert victim.is_dir()


@pytest.mark.parametrize("content", ([torch.ones(2)], torch.ones(2), 3), ids=("list", "tensor", "number"))
def test_a_pickle_without_names_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt must hold a dictionary of tensors by name, got (list|Tensor|int)"):
        convert_checkpoint(tmp_path / "model.pt", tmp_path / "ours", "vggt")
