"""Model cards: what they say, what they never overwrite, and what a push uploads."""

import copy
from pathlib import Path

import PIL.Image
import pytest
import transformers.modeling_utils as modeling_utils
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, get_peft_model
from tiny import depth_anything_3_config, pretraining_config, spa3r_config, vggt_config
from transformers.utils import hub

from spa3r import DepthAnything3Model, Spa3RForPreTraining, Spa3RModel, VggtModel
from spa3r.models.model_card import license_of, model_card, parts_of, source_names, write_model_card
from spa3r.rooms.embedded import embedded_model

OWN = "---\nlicense: mit\n---\n# Mine\n"


@pytest.fixture(scope="module")
def vlm():
    return embedded_model()[0]


def test_a_saved_model_has_a_card(tmp_path, vlm):
    Spa3RModel(spa3r_config()).save_pretrained(tmp_path / "spa3r")
    vlm.save_pretrained(tmp_path / "vlm")
    card = ModelCard.load(tmp_path / "spa3r" / "README.md")
    assert card.data.library_name == "spa3r" and card.data.pipeline_tag == "image-feature-extraction"
    assert "Spa3RModel.from_pretrained" in card.text and card.data.base_model is None
    card = ModelCard.load(tmp_path / "vlm" / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text" and "Spa3VLM.from_pretrained" in card.text
    compile(card.text.partition("```python\n")[2].partition("```")[0], "card", "exec")


def test_base_models_and_the_strictest_license():
    config = pretraining_config(backbone_name_or_path="facebook/VGGT-1B")
    config.semantic_teacher_config.name_or_path = "facebook/dinov3-vitl16-pretrain-lvd1689m"
    assert parts_of(config) == ["facebook/VGGT-1B", "facebook/dinov3-vitl16-pretrain-lvd1689m"]
    card = model_card(Spa3RForPreTraining(config))
    assert card.data.license == "cc-by-nc-4.0" and card.data.base_model == parts_of(config)
    assert "may not be used commercially" in card.text
    assert license_of(["facebook/VGGT-1B-Commercial", "Qwen/Qwen3-VL-4B-Instruct"]) == "other"
    assert license_of(["depth-anything/DA3-BASE", "facebook/VGGT-1B"]) == "cc-by-nc-4.0"
    assert license_of(["depth-anything/DA3-BASE", "depth-anything/DA3-SMALL"]) == "apache-2.0"
    assert license_of(["depth-anything/DA3-BASE", "someone/unknown"]) is None  # may be stricter
    for size, license_id, words in (("BASE", "apache-2.0", "allows any use"), ("LARGE", "cc-by-nc-4.0", "may not be")):
        free = spa3r_config(backbone_config=depth_anything_3_config(), targets=["geometry"])
        free.backbone_name_or_path = f"depth-anything/DA3-{size}"
        card = model_card(Spa3RModel(free))
        assert (card.data.license, card.data.base_model) == (license_id, [f"depth-anything/DA3-{size}"])
        assert words in card.text
    unknown = model_card(Spa3RModel(spa3r_config()))
    assert unknown.data.license is None and "The license of the weights is not known" in unknown.text


def test_folders_of_a_machine_are_not_named(tmp_path):
    config = spa3r_config()
    config.backbone_config.name_or_path = str(tmp_path)
    assert parts_of(config) == [] and str(tmp_path) not in str(model_card(Spa3RModel(config)))
    sources = [
        {"type": "folder", "root": str(tmp_path / "photos")},
        {"type": "dataset", "path": "nyu-visionx/VSI-590K"},
    ]
    assert source_names(sources) == ["folder photos", "nyu-visionx/VSI-590K"]
    assert source_names({"type": "room_questions", "num_rooms": 2}) == ["room questions"]
    assert source_names({"mixture": {"a": {"annotations": "org/rows"}, "b": {"annotations": "x/rows.json"}}}) == [
        "org/rows",
        "x/rows.json",
    ]


def test_training_data_is_named():
    card = model_card(Spa3RModel(spa3r_config()), training_data=["nyu-visionx/VSI-590K", "folder photos"])
    assert card.data.datasets == ["nyu-visionx/VSI-590K"] and "- folder photos" in card.text


def test_examples_run(tmp_path):
    PIL.Image.new("RGB", (64, 48)).save(tmp_path / "photo_1.jpg")
    PIL.Image.new("RGB", (48, 64)).save(tmp_path / "photo_2.jpg")
    backbones = VggtModel(vggt_config()), DepthAnything3Model(depth_anything_3_config())
    for model in (Spa3RModel(spa3r_config()), *backbones):
        model.save_pretrained(tmp_path / "model")
        example = ModelCard.load(tmp_path / "model" / "README.md").text.partition("```python\n")[2].partition("```")[0]
        exec(example.replace("path/or/hub-id", str(tmp_path / "model")).replace("photo_", f"{tmp_path}/photo_"), {})
        (tmp_path / "model" / "README.md").unlink()


PARTLY_FILLED = str(ModelCard.from_template(ModelCardData(license="mit"), model_description="Mine."))


@pytest.mark.parametrize("own", (OWN.encode(), PARTLY_FILLED.encode(), "# Größe\r\n".encode("latin-1")))
def test_a_card_that_is_there_is_kept(tmp_path, own):
    (tmp_path / "README.md").write_bytes(own)
    Spa3RModel(spa3r_config()).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == own


def test_pefts_template_is_no_card_of_the_users(tmp_path, vlm):
    peft = get_peft_model(
        copy.deepcopy(vlm), LoraConfig(target_modules=["q_proj"], base_model_name_or_path="some/model")
    )
    peft.save_pretrained(tmp_path)
    assert "[More Information Needed]" in (tmp_path / "README.md").read_text()
    write_model_card(peft, tmp_path, ["org/rows"])
    card = ModelCard.load(tmp_path / "README.md")
    assert "Adapters (PEFT) for a Spa3VLM" in card.text and card.data.datasets == ["org/rows"]


@pytest.mark.parametrize("at_home", (False, True), ids=("nothing on the hub", "a card on the hub"))
@pytest.mark.parametrize("way", ("save_pretrained", "save_pretrained over a card", "push_to_hub"))
def test_what_a_push_uploads(tmp_path, monkeypatch, way, at_home):
    """Only the requests are replaced: everything before them is transformers' own."""
    uploaded = {}

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            return type("Repo", (), {"repo_id": repo_id})

    def load(repo_id, **kwargs):
        if at_home:
            return ModelCard("---\nlicense: mit\n---\n# Of the hub\n")
        raise EntryNotFoundError("none")

    def upload(self, working_dir, repo_id, *args, **kwargs):
        uploaded["text"] = (Path(working_dir) / "README.md").read_text()

    for module in (hub, modeling_utils):
        monkeypatch.setattr(module, "hf_api", lambda: Hub())
    monkeypatch.setattr(hub.ModelCard, "load", load)
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    model = Spa3RModel(spa3r_config())
    if way == "push_to_hub":
        model.push_to_hub("someone/spa3r")
    else:
        if way.endswith("card"):
            (tmp_path / "README.md").write_text(OWN)
        model.save_pretrained(tmp_path, push_to_hub=True, repo_id="someone/spa3r")
    if way.endswith("card"):
        assert uploaded["text"] == OWN == (tmp_path / "README.md").read_text()
    elif at_home:
        assert "# Of the hub" in uploaded["text"]
    else:
        assert "Spa3RModel.from_pretrained" in uploaded["text"] and "automatically generated" not in uploaded["text"]
