"""Muon beside AdamW: who trains what, by which rule, and that a resumed run goes on as it would have."""

import copy

import pytest
import torch
from tiny_finetuning import composed
from tiny_finetuning import trainer as finetuning_trainer
from tiny_training import Kill, arguments, same_files, trainer, write_scenes
from torch import nn

from spa3r.training import PretrainingTrainer, read_log
from spa3r.training.optimizers import MuonAndAdamW, layer_matrices

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"))


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 4), nn.ModuleList([nn.Linear(4, 8)])[0], nn.Linear(8, 3))


def names_of(optimizer: MuonAndAdamW, model: nn.Module) -> list[set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [{names[id(one)] for group in part.param_groups for one in group["params"]} for part in optimizer._parts]


def test_each_part_moves_by_its_own_rule():
    """A step is that of PyTorch's Muon on the matrices, and of its AdamW on the others."""
    model, alone = small_model(), small_model()
    optimizer = MuonAndAdamW([{"params": list(model.parameters())}], [model[1].weight], lr=0.1, weight_decay=0.01)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.01
    muon = torch.optim.Muon([alone[1].weight], lr=0.02, weight_decay=0.01)
    others = [one for one in alone.parameters() if one is not alone[1].weight]
    adamw = torch.optim.AdamW(others, lr=0.1, weight_decay=0.01)
    assert names_of(optimizer, model) == [{"0.weight", "1.bias", "2.weight", "2.bias"}, {"1.weight"}]
    for step in range(3):
        for one in (model, alone):
            one(torch.tensor([step, 4])).square().sum().backward()
        for one in (optimizer, muon, adamw):
            one.step()
            one.zero_grad()
    for ours, theirs in zip(model.parameters(), alone.parameters()):
        assert torch.equal(ours, theirs)
    assert not torch.equal(model[1].weight, small_model()[1].weight)


def test_state_comes_back():
    model, again = small_model(), small_model()
    optimizers = []
    for one in (model, again):
        optimizers.append(MuonAndAdamW([{"params": list(one.parameters())}], [one[1].weight], lr=0.1))

    def step(one, optimizer):
        one(torch.tensor([1, 2])).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(model, optimizers[0])
    again.load_state_dict(model.state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    optimizers[1].param_groups[0]["lr"] = optimizers[0].param_groups[0]["lr"] = 0.05  # as a schedule does
    step(model, optimizers[0]), step(again, optimizers[1])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), again.parameters()))


def test_pretraining_gives_muon_the_layers(scenes, tmp_path):
    ours = trainer(tmp_path / "run", scenes, muon_learning_rate=0.02, weight_decay=0.3)
    of_adamw, of_muon = names_of(ours.create_optimizer(), ours.model)
    assert of_muon == {
        f"spa3r.{part}.layers.0.{weight}.weight"
        for part in ("encoder", "decoder")
        for weight in ("attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2")
    }
    assert of_muon | of_adamw == {name for name, one in ours.model.named_parameters() if one.requires_grad}
    assert {group["weight_decay"] for group in ours.optimizer.param_groups} == {0.3, 0.0}


def test_finetuning_gives_muon_the_adapter_and_the_language_model(tmp_path):
    model, processor = composed()
    ours = finetuning_trainer(tmp_path / "run", model=model, processor=processor, muon_learning_rate=0.02)
    of_adamw, of_muon = names_of(ours.create_optimizer(), ours.model)
    assert {"adapter.bottleneck.fc2.weight", "adapter.cross_attention.proj.weight"} <= of_muon
    assert any("self_attn.q_proj" in name for name in of_muon)
    assert any("embed_tokens" in name for name in of_adamw)
    assert not any("norm" in name or "visual" in name for name in of_muon)
    rates = {group["lr"] for part in ours.optimizer._parts for group in part.param_groups}
    assert rates == {0.02, ours.args.learning_rate}


def test_resumed_run_ends_in_the_same_weights(scenes, tmp_path):
    fields = {"max_steps": 6, "save_steps": 2, "muon_learning_rate": 0.02}
    trainer(tmp_path / "whole", scenes, **fields).train()
    with pytest.raises(InterruptedError):
        trainer(tmp_path / "run", scenes, callbacks=[Kill(3)], **fields).train()
    resumed = trainer(tmp_path / "run", scenes, **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name in ("model.safetensors", "optimizer.safetensors"):
        same_files(tmp_path / "run" / "checkpoint-6", tmp_path / "whole" / "checkpoint-6", name)
    first, *_ = read_log(tmp_path / "whole" / "log.jsonl")
    assert first["learning_rate"] == pytest.approx(2e-3)  # AdamW's


def test_unlike_adamw(scenes, tmp_path):
    for name in ("muon", "adamw"):
        trainer(
            tmp_path / name, scenes, max_steps=2, save_steps=2, muon_learning_rate=0.02 if name == "muon" else None
        ).train()
    with pytest.raises(AssertionError):
        same_files(tmp_path / "muon" / "checkpoint-2", tmp_path / "adamw" / "checkpoint-2")


def test_matrices_are_named_once():
    model, _ = composed()
    matrices = layer_matrices(model)
    assert len(matrices) == len({id(one) for one in matrices}) and all(one.ndim == 2 for one in matrices)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"optim": "sgd"}, r"`muon_learning_rate` goes with `optim` adamw_torch or .* got 'sgd'.*Leave one"),
        ({"muon_learning_rate": 0.0}, r"`muon_learning_rate` must be above 0, such as 0.02, got 0.0\. Leave it out"),
    ],
)
def test_what_does_not_suit(fields, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        arguments(tmp_path, **({"muon_learning_rate": 0.02} | fields))


def test_sharded_models_are_refused(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(PretrainingTrainer, "is_sharded", True)
    with pytest.raises(ValueError, match=r"`muon_learning_rate` must be None where FSDP or DeepSpeed shards.*Leave it"):
        trainer(tmp_path / "run", scenes, muon_learning_rate=0.02)
