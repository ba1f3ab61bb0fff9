"""The trainer in one process: what it computes, what it saves, how it goes on."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import PATCH, alive, pretraining_config, relative_error
from tiny_training import SIZES, Kill, arguments, batches, same_files, trainer, write_parts, write_scenes
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from spa3r import Spa3RForPreTraining, Spa3RImageProcessor, Spa3RModel
from spa3r.training import PretrainingArguments, PretrainingTrainer, read_log, whole_batch
from spa3r.training.checkpoints import checkpoints_in, load_state, random_state, save_state, set_random_state

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"))


def model_of(**fields) -> Spa3RForPreTraining:
    torch.manual_seed(0)
    return Spa3RForPreTraining(pretraining_config(**(SIZES | fields)))


# The recipe -----------------------------------------------------------------------------------------------------------


def test_defaults_are_the_recipe(tmp_path):
    args = PretrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert (args.max_steps, args.learning_rate, args.weight_decay, args.max_grad_norm) == (80_000, 2e-3, 1e-4, 1.0)
    assert (args.gradient_accumulation_steps, args.optim) == (2, "adamw_torch_fused")
    parameter = torch.nn.Parameter(torch.zeros(1))
    helper = Trainer(torch.nn.Linear(1, 1), args)
    schedule = helper.create_scheduler(args.max_steps, torch.optim.AdamW([parameter], lr=args.learning_rate))
    rates = {0: 2e-3, 40_000: 1.1e-3, 79_999: 2e-4}
    assert {step: schedule.lr_lambdas[0](step) * 2e-3 for step in rates} == pytest.approx(rates, rel=1e-3)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_steps": -1}, r"`max_steps` must be at least 1, got -1"),
        ({"save_strategy": "epoch"}, r"`save_strategy` must be 'steps' or 'no', got 'epoch'"),
        ({"per_device_train_batch_size": 4}, r"must be 1, .* got 4\. .*pictures_per_batch"),
    ],
)
def test_arguments_that_do_not_suit(fields, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        PretrainingArguments(output_dir=str(tmp_path), use_cpu=True, **fields)


# Gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_views", ("all", "target"))
def test_accumulated_gradient_is_that_of_all_patches_at_once(scenes, tmp_path, loss_views):
    """Micro batches of other numbers of views and sizes: every patch counts the same."""
    parts = list(batches(scenes, tmp_path / "index", views=(2, 4), pictures_per_batch=4))[:4]
    masks = [part["target_mask"] | (loss_views == "all") for part in parts]
    counts = [int((part["view_grid_hw"].prod(-1) * mask).sum()) for part, mask in zip(parts, masks)]
    assert len(set(counts)) > 1  # else a mean of means would do
    whole = {key: torch.cat([part[key] for part in parts]) for key in whole_batch([parts[0]])}
    expected = alive(model_of(loss_views=loss_views)).train()
    expected(**whole).loss.backward()

    ours = trainer(tmp_path / "run", scenes, alive(model_of(loss_views=loss_views)))
    ours.create_optimizer()
    for part in parts:
        part["num_patches"] = sum(ours._counted_patches_per_view(part))
    total = sum(part["num_patches"] for part in parts)
    assert [part["num_patches"] for part in parts] == counts
    losses = [ours.training_step(ours.model, part, total) for part in parts]
    for (name, parameter), reference in zip(ours.model.named_parameters(), expected.parameters()):
        if parameter.requires_grad:
            assert relative_error(parameter.grad, reference.grad) < 1e-5, name
    torch.testing.assert_close(sum(losses), expected(**whole).loss.detach())


def test_frozen_parts_run_once_a_step_keep_nothing_and_stay_in_eval_mode(scenes, tmp_path):
    """And in the asymmetric mode the backbone runs once for context and targets."""
    ours = trainer(tmp_path / "run", scenes, max_steps=2, save_strategy="no")
    calls, kept, frozen_before = [], [], {}
    for path, part in ours.model.frozen_modules().items():
        frozen_before[path] = {key: value.clone() for key, value in part.state_dict().items()}
        name = "forward_layout" if path.endswith("backbone") else "forward"
        method = getattr(part, name)

        def watched(*args, path=path, method=method, part=part, **kwargs):
            calls.append((path, part.training, any(module.training for module in part.modules())))
            keep = lambda tensor: kept.append(path) or tensor  # noqa: E731
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                return method(*args, **kwargs)

        setattr(part, name, watched)
    ours.train()
    assert sorted(calls) == [("semantic_teacher", False, False)] * 2 + [("spa3r.backbone", False, False)] * 2
    assert kept == []
    for path, part in ours.model.frozen_modules().items():
        assert all(torch.equal(value, frozen_before[path][key]) for key, value in part.state_dict().items())
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in part.parameters())


# Logs -----------------------------------------------------------------------------------------------------------------


def test_every_term_is_logged(scenes, tmp_path):
    trainer(tmp_path / "run", scenes, max_steps=4, logging_steps=2).train()
    *entries, last = read_log(tmp_path / "run" / "log.jsonl")
    terms = {"geometry_l1", "geometry_cosine", "semantic_l1", "semantic_cosine", "depth_probe"}
    wanted = {"step", "loss", *terms, "grad_norm", "learning_rate", "views_per_second", "skipped_pictures", "epoch"}
    assert [entry["step"] for entry in entries] == [2, 4] and set(entries[0]) == wanted
    assert entries[0]["loss"] == pytest.approx(sum(entries[0][term] for term in terms))
    assert set(last) == {"step", "train_runtime", "train_steps_per_second", "epoch"}


def test_logged_loss_is_the_mean_over_the_patches_of_the_steps(scenes, tmp_path):
    """With a learning rate of 0 it can be computed afterwards."""
    trainer(tmp_path / "run", scenes, model_of(), max_steps=3, logging_steps=3, learning_rate=0.0).train()
    model, sums, patches = model_of().train(), 0.0, 0
    for batch in list(batches(scenes, tmp_path / "index"))[:3]:
        count = int(batch["view_grid_hw"].prod(-1).sum())
        sums, patches = sums + model(**whole_batch([batch])).loss.item() * count, patches + count
    assert read_log(tmp_path / "run" / "log.jsonl")[0]["loss"] == pytest.approx(sums / patches, rel=1e-5)


# Resuming -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", (0, 2))
def test_resumed_run_ends_in_the_same_weights_and_log(scenes, tmp_path, workers):
    fields = {"max_steps": 7, "save_steps": 2, "gradient_accumulation_steps": 2, "dataloader_num_workers": workers}
    trainer(tmp_path / "whole", scenes, **fields).train()
    with pytest.raises(InterruptedError):
        trainer(tmp_path / "run", scenes, callbacks=[Kill(5)], **fields).train()
    assert [folder.name for folder in checkpoints_in(tmp_path / "run")] == ["checkpoint-2", "checkpoint-4"]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    resumed = trainer(tmp_path / "run", scenes, model_of(), **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    same_files(tmp_path / "run" / "checkpoint-7", tmp_path / "whole" / "checkpoint-7")
    same_files(tmp_path / "run" / "checkpoint-7", tmp_path / "whole" / "checkpoint-7", "optimizer.safetensors")
    times = {"views_per_second", "train_runtime", "train_steps_per_second"}
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("run", "whole")]
    ours, theirs = ([{k: v for k, v in line.items() if k not in times} for line in log] for log in logs)
    assert ours == theirs and [line["step"] for line in ours] == [*range(1, 8), 7]


def test_nothing_seen_twice_and_nothing_decoded_again(scenes, tmp_path):
    """The resumed run takes the epoch up where it was left, across its end, and loads only what it trains on."""
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(watched._step_batches[-1][0]["scenes"])

    fields = {"max_steps": 12, "save_steps": 4}
    watched = trainer(tmp_path / "run", scenes, callbacks=[Watch(), Kill(6)], **fields)
    with pytest.raises(InterruptedError):
        watched.train()
    del seen[4:]
    watched = trainer(tmp_path / "run", scenes, callbacks=[Watch()], **fields)
    source = watched.train_dataset.sources[0]
    load, loads = source.load, []
    source.load = lambda scene, frames: loads.append(scene) or load(scene, frames)
    watched.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    per_epoch, flat = len(watched.train_dataset), [scene for batch in seen for scene in batch]
    assert len(seen) == 12 > 2 * per_epoch
    for epoch in range(2):
        in_epoch = [scene for batch in seen[epoch * per_epoch : (epoch + 1) * per_epoch] for scene in batch]
        assert len(in_epoch) == len(set(in_epoch)) == 12
    assert len(loads) == len([scene for batch in seen[4:] for scene in batch]) < len(flat)


def test_checkpoints_are_small_hold_no_pickles_and_are_few(scenes, tmp_path):
    parts = write_parts(tmp_path / "parts")
    model = Spa3RForPreTraining.from_backbone_and_dinov3(*parts.values(), **SIZES)
    processor = Spa3RImageProcessor(patch_size=PATCH, size=5 * PATCH)
    args = arguments(tmp_path / "run", max_steps=4, save_steps=1, save_total_limit=2)
    ours = PretrainingTrainer(model, args, batches(scenes, tmp_path / "index"), processing_class=processor)
    ours.train()
    ours.save_model()
    assert [folder.name for folder in checkpoints_in(tmp_path / "run")] == ["checkpoint-3", "checkpoint-4"]
    names = {file.name for file in (tmp_path / "run").rglob("*") if file.is_file()}
    assert {Path(name).suffix for name in names} <= {".json", ".jsonl", ".safetensors", ".md"}
    assert not (tmp_path / "run" / ".unfinished").exists()
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-4"):
        keys = load_file(folder / "model.safetensors").keys()
        assert keys == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert json.loads((folder / "config.json").read_text())["backbone_name_or_path"] == parts["backbone"]
        loaded = Spa3RForPreTraining.from_pretrained(folder)
        assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    Spa3RModel.from_pretrained(tmp_path / "run")


def test_parts_without_a_home_are_saved(scenes, tmp_path):
    ours = trainer(tmp_path / "run", scenes, max_steps=1)
    ours.train()
    assert load_file(tmp_path / "run" / "checkpoint-1" / "model.safetensors").keys() == ours.model.state_dict().keys()


def test_checkpoint_of_another_model_is_refused(scenes, tmp_path):
    trainer(tmp_path / "run", scenes, max_steps=1).train()
    other = trainer(tmp_path / "run", scenes, model_of(targets=["geometry"]), max_steps=2)
    with pytest.raises(
        ValueError, match=r"doesn't fit the model: it lacks nothing and has the unexpected keys .*semantic"
    ):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


def test_checkpoint_of_other_processes_is_refused(scenes, tmp_path):
    trainer(tmp_path / "run", scenes, max_steps=1).train()
    file = tmp_path / "run" / "checkpoint-1" / "training_state.safetensors"
    save_state(load_state(file) | {"processes": 8}, file)
    with pytest.raises(ValueError, match=r"was saved by 8 processes, and this run has 1"):
        trainer(tmp_path / "run", scenes, max_steps=2).train(resume_from_checkpoint=str(file.parent))


def test_generators_go_on_where_they_were(tmp_path):
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    random.gauss(0, 1), np.random.normal(), torch.rand(3)  # each leaves a half-used draw behind
    save_state(random_state(), tmp_path / "state.safetensors")

    def draw():
        return random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand(), torch.rand(2).tolist()

    expected = draw()
    assert draw() != expected
    set_random_state(load_state(tmp_path / "state.safetensors"))
    assert draw() == expected


def test_state_comes_back_as_it_was(tmp_path):
    state = {0: {"step": torch.tensor(3.0), "half": torch.ones(2, dtype=torch.bfloat16)}, "betas": (0.9, 0.1 + 0.2)}
    state |= {"list": [1, None, True, "a"], "shared": [state[0]["half"]] * 2, "empty": {}}
    save_state(state, tmp_path / "state.safetensors")
    loaded = load_state(tmp_path / "state.safetensors")
    assert torch.equal(loaded[0].pop("half"), state[0]["half"]) and loaded[0].pop("step") == 3.0
    assert len(loaded.pop("shared")) == 2 and loaded == {0: {}, "betas": (0.9, 0.1 + 0.2), "empty": {}} | {
        "list": state["list"]
    }
    with pytest.raises(TypeError, match=r"A state may hold tensors, numbers, .* got <class 'set'>"):
        save_state({1, 2}, tmp_path / "other.safetensors")


# What goes wrong ------------------------------------------------------------------------------------------------------


class Poison(TrainerCallback):
    """Lets one scene's pictures overflow in chosen steps."""

    def __init__(self, steps, scene: int = 0):
        self.steps, self.scene, self.names = steps, scene, []

    def attach(self, ours: PretrainingTrainer) -> PretrainingTrainer:
        original = ours.get_batch_samples

        def poisoned(iterator, num_batches, device):
            samples, patches = original(iterator, num_batches, device)
            if ours.state.global_step + 1 in self.steps:
                batch = samples[-1]
                rows = batch["view_grid_hw"].prod(-1)[: int(batch["views_per_scene"][0])].sum()
                batch["view_pixel_values"][:rows] = float("nan")
                self.names.append(batch["scenes"][0])
            return samples, patches

        ours.get_batch_samples = poisoned
        return ours


def test_nonfinite_step_is_dropped_and_the_scene_named(scenes, tmp_path, caplog):
    poison = Poison({2})
    ours = poison.attach(trainer(tmp_path / "run", scenes, max_steps=3, save_steps=1, save_total_limit=None))
    ours.train()
    same_files(tmp_path / "run" / "checkpoint-2", tmp_path / "run" / "checkpoint-1")  # not even weight decay
    weights = load_file(tmp_path / "run" / "checkpoint-3" / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    before = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    assert any(not torch.equal(weights[key], before[key]) for key in weights)
    log = read_log(tmp_path / "run" / "log.jsonl")
    (dropped,) = [line for line in log if "nonfinite_scenes" in line]
    assert (dropped["nonfinite_step"], dropped["nonfinite_scenes"]) == (2, poison.names[0])
    (entry,) = [line for line in log if line["step"] == 2 and "loss" in line]
    assert entry["loss"] is None and entry["grad_norm"] is None
    assert ours.nonfinite_steps == 1


def test_too_many_nonfinite_steps_are_an_error(scenes, tmp_path):
    ours = trainer(tmp_path / "run", scenes, max_steps=9, max_nonfinite_steps=1)
    poison = Poison({2, 3})
    words = r"2 steps had to be dropped .* more than `max_nonfinite_steps` = 1; the last one because of scenes scenes"
    with pytest.raises(ValueError, match=words):
        poison.attach(ours).train()


def test_signal_saves_and_ends(scenes, tmp_path):
    ours = trainer(tmp_path / "run", scenes, max_steps=50, save_steps=50)

    class Ask(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            ours.stop_requested = state.global_step >= 3

    ours.add_callback(Ask())
    ours.train()
    assert ours.state.global_step == 5 and [f.name for f in checkpoints_in(tmp_path / "run")] == ["checkpoint-5"]


def test_evaluation_does_not_change_training(scenes, tmp_path):
    fields = {"max_steps": 4, "save_steps": 4}
    trainer(tmp_path / "plain", scenes, **fields).train()
    held_out = batches(scenes, tmp_path / "index", views=(4, 4), scenes_per_epoch=6, seed=5)
    ours = trainer(tmp_path / "run", scenes, **fields, eval_dataset=held_out, eval_strategy="steps", eval_steps=2)
    ours.train()
    same_files(tmp_path / "run" / "checkpoint-4", tmp_path / "plain" / "checkpoint-4")
    entries = [line for line in read_log(tmp_path / "run" / "log.jsonl") if "eval_loss" in line]
    assert [entry["step"] for entry in entries] == [2, 4]
    model, sums, patches = ours.model.eval(), 0.0, 0
    ours.eval_dataset.set_epoch(0)
    with torch.no_grad():
        for batch in ours.eval_dataset:
            count = int(batch["view_grid_hw"].prod(-1).sum())
            sums, patches = sums + model(**whole_batch([batch])).loss.item() * count, patches + count
    assert entries[1]["eval_loss"] == pytest.approx(sums / patches, rel=1e-5)
    from spa3r.evaluation import evaluate_field

    report = evaluate_field(model, ours.eval_dataset)
    assert entries[1]["eval_field_geometry_cosine"] == pytest.approx(report.rows["model"]["geometry_cosine"].mean)
    assert entries[1]["eval_field_semantic_error_gap_closed"] == pytest.approx(report.gap_closed["semantic_error"])


def test_best_checkpoint_is_kept_and_loaded(scenes, tmp_path):
    """The learning rate grows until it does harm, so the best model is not the last one."""
    held_out = batches(scenes, tmp_path / "index", views=(4, 4), scenes_per_epoch=6, seed=5)
    fields = {"max_steps": 6, "save_steps": 1, "save_total_limit": 1, "eval_strategy": "steps", "eval_steps": 1}
    fields |= {"learning_rate": 1.0, "warmup_steps": 6, "max_grad_norm": 0.0, "load_best_model_at_end": True}
    ours = trainer(tmp_path / "run", scenes, eval_dataset=held_out, **fields)
    ours.train()
    losses = {
        line["step"]: line["eval_loss"] for line in read_log(tmp_path / "run" / "log.jsonl") if "eval_loss" in line
    }
    best = min(losses, key=losses.get)
    assert best < 6
    folder = tmp_path / "run" / f"checkpoint-{best}"
    assert ours.state.best_model_checkpoint == str(folder) and checkpoints_in(tmp_path / "run")[0] == folder
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, saved[key]) for key, value in ours.model.state_dict().items())


# Without our trainer --------------------------------------------------------------------------------------------------


def first_losses(scenes, tmp_path) -> list[float]:
    trainer(tmp_path / "reference", scenes, model_of(), save_strategy="no", max_steps=3, learning_rate=1e-3).train()
    return [line["loss"] for line in read_log(tmp_path / "reference" / "log.jsonl") if "loss" in line]


def optimizer_for(model):
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in model.named_parameters() if name in names]
    return torch.optim.AdamW(plain, lr=1e-3, weight_decay=0.0)


def test_bare_loop(scenes, tmp_path):
    model = model_of().train()
    optimizer, losses = optimizer_for(model), []
    for batch in DataLoader(batches(scenes, tmp_path / "index"), batch_size=None):
        loss = model(**whole_batch([batch])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    reference = first_losses(scenes, tmp_path)
    assert losses[0] == pytest.approx(reference[0], rel=1e-6) and losses[:3] == pytest.approx(reference, rel=0.02)


def test_accelerate_loop(scenes, tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=1)
    model = model_of().train()
    model, optimizer = accelerator.prepare(model, optimizer_for(model))
    losses = []
    for batch in DataLoader(batches(scenes, tmp_path / "index"), batch_size=None):  # not prepared: batches stay whole
        loss = model(**whole_batch([batch])).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[:3] == pytest.approx(first_losses(scenes, tmp_path), rel=0.02)


def test_plain_trainer(scenes, tmp_path):
    args = TrainingArguments(
        output_dir=str(tmp_path / "plain"),
        max_steps=3,
        learning_rate=1e-3,
        per_device_train_batch_size=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        accelerator_config={"dispatch_batches": False},
    )
    plain = Trainer(model_of(), args, data_collator=whole_batch, train_dataset=batches(scenes, tmp_path / "index"))
    plain.train()
    losses = [entry["loss"] for entry in plain.state.log_history if "loss" in entry]
    assert losses == pytest.approx(first_losses(scenes, tmp_path), rel=0.02)
    with pytest.raises(ValueError, match=r"must hold one whole batch of scenes, got 2"):
        whole_batch([{}, {}])
