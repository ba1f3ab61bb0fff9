"""The trainer of instructions in one process: what it trains, what it computes, what it saves, how it goes on."""

import json
import os
import sys

import PIL.Image
import pytest
import torch
from peft import PeftModel
from tiny import PATCH, realigned, relative_error, spa3r_config
from tiny_finetuning import arguments, composed, example, examples, trainer
from tiny_training import Kill, same_files
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from vlm_families import FAMILIES, build

from spa3r import (
    Spa3RImageProcessor,
    Spa3RModel,
    Spa3VLMForConditionalGeneration,
    Spa3VLMProcessor,
)
from spa3r.data.collator import Spa3VLMCollator
from spa3r.rooms.embedded import embedded_spa3r
from spa3r.training import FinetuningArguments, InstructionBatches, apply_policy, group_table, read_log
from spa3r.training.checkpoints import checkpoints_in
from spa3r.training.finetuning.policies import ADAPTER, ENCODER, LANGUAGE, LOW_RANK, REST, VISION, parts_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*lr_scheduler.step", "ignore:.*gradient_checkpointing", "ignore:This DataLoader"
)


class Watch(TrainerCallback):
    """Keeps the gradients of the first step, as the optimizer sees them."""

    def __init__(self):
        self.gradients = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.gradients:
            self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# The recipe and the policies ------------------------------------------------------------------------------------------


def test_defaults_are_the_papers_recipe(tmp_path):
    args = FinetuningArguments(output_dir=str(tmp_path), use_cpu=True)
    assert (args.policy, args.num_train_epochs, args.learning_rate, args.weight_decay) == ("paper", 1.0, 1e-5, 0.01)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.max_grad_norm) == (1, 8, 1.0)
    assert (args.lr_scheduler_type, args.get_warmup_steps(1000), args.optim) == ("cosine", 30, "adamw_torch_fused")
    assert args.bf16 is False  # on a CPU


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"policy": "all"}, r"`policy` must be one of paper, adapter_only, lora, qlora, end_to_end, got 'all'"),
        ({"psfm_weight": 1.0}, r"`psfm_weight` must be 0 .* got 1\.0 with the policy 'paper'.*'end_to_end'"),
        ({"save_strategy": "epoch"}, r"`save_strategy` must be 'steps' or 'no', got 'epoch'"),
    ],
)
def test_arguments_that_do_not_suit(fields, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        arguments(tmp_path, **fields)


@pytest.mark.parametrize(
    ("policy", "trained"),
    [
        ("paper", {ADAPTER, LANGUAGE}),
        ("adapter_only", {ADAPTER}),
        ("lora", {ADAPTER, LOW_RANK}),
        ("end_to_end", {ADAPTER, LANGUAGE, ENCODER}),
    ],
)
def test_each_policy_trains_exactly_what_it_names(policy, trained, tmp_path):
    ours = trainer(tmp_path, policy=policy, spa3r_learning_rate=1e-3, per_device_train_batch_size=8)
    groups = ours.parameter_groups()
    assert {group.part for group in groups if group.learning_rate is not None} == trained
    model = ours.model
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    ours.train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    base = model.get_base_model() if policy == "lora" else model
    part_of = {id(p): part for part, members in parts_of(base).items() for p in members}
    wanted = set()
    for name, parameter in model.named_parameters():
        part = LOW_RANK if ".lora_" in name else part_of[id(parameter)]
        if part in trained and "original_module." not in name:
            wanted.add(name)
    assert changed == wanted and wanted
    learning = [p for p in model.parameters() if p.requires_grad]
    assert sum(group.size for group in groups if group.learning_rate is not None) == sum(p.numel() for p in learning)
    assert all(p.dtype == torch.float32 for p in learning)


def test_groups_and_their_sizes(tmp_path):
    ours = trainer(tmp_path, policy="end_to_end", spa3r_learning_rate=2e-6, weight_decay=0.1)
    groups = ours.parameter_groups()
    counted = sum(group.size for group in groups)
    assert counted == sum(p.numel() for p in ours.model.parameters())
    lines = group_table(groups).splitlines()
    assert lines[0].split() == "parameters of the how many learning rate weight decay".split()
    encoder = [line for line in lines if line.startswith(ENCODER)]
    assert len(encoder) == 2 and all("2e-06" in line for line in encoder) and encoder[0].endswith("0.1")
    assert next(line for line in lines if line.startswith(VISION)).endswith("frozen")
    optimizer = ours.create_optimizer()
    assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {
        *((1e-3, 0.1), (1e-3, 0.0), (2e-6, 0.1), (2e-6, 0.0)),
    }
    assert any(line.startswith(REST) for line in lines)


def test_policies_that_the_model_or_the_machine_does_not_allow(tmp_path):
    vlm = composed()[0].vlm
    alone = Spa3VLMForConditionalGeneration.from_vlm_and_spa3r(vlm, spatial_source="none")
    with pytest.raises(ValueError, match=r"'adapter_only' trains the adapter, and this model has none"):
        apply_policy(alone, arguments(tmp_path, policy="adapter_only"))
    with pytest.raises(ValueError, match=r"'end_to_end' trains Spa3R's encoder, which this model doesn't use"):
        apply_policy(alone, arguments(tmp_path, policy="end_to_end"))
    with pytest.raises(ValueError, match=r"`psfm` must be the Spa3RForPreTraining .* got none"):
        trainer(tmp_path, policy="end_to_end", psfm_weight=0.5)


def test_qlora_says_what_is_missing(tmp_path, monkeypatch):
    from spa3r.training.finetuning.policies import quantization

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"'qlora' needs bitsandbytes.*spa3r\[qlora\].*use 'lora'"):
        quantization(arguments(tmp_path, policy="qlora"), "a/vlm")


# Gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ("paper", "lora"))
def test_accumulated_gradient_is_that_of_all_tokens_at_once(policy, tmp_path):
    """Answers of 1 to 9 words, scenes of 0 to 3 pictures: every token counts the same, however rows are spread."""
    results = []
    for size in (8, 2):
        watch = Watch()
        torch.manual_seed(0)  # of the low-rank updates
        fields = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_grad_norm": 0.0}
        trainer(tmp_path / str(size), policy=policy, callbacks=[watch], max_steps=1, **fields).train()
        results.append((watch.gradients, read_log(tmp_path / str(size) / "log.jsonl")[0]["loss"]))
    (whole, loss), (parts, same_loss) = results
    assert whole.keys() == parts.keys() and len(whole) > 10
    for name in [name for name in whole if name.endswith("cross_attention.k_norm.bias")]:
        # It adds the same to all logits of a query, which changes no softmax: its gradient is 0 but for rounding.
        largest = max(gradients.pop(name).abs().max() for gradients in (whole, parts))
        assert largest < 1e-5 * whole[name.replace("bias", "weight")].abs().max()
    errors = {name: relative_error(parts[name], whole[name]) for name in whole if whole[name].abs().max() > 1e-9}
    assert max(errors.values()) < 1e-5, max(errors, key=errors.get)
    assert same_loss == pytest.approx(loss, rel=1e-5)


def test_loss_is_the_mean_over_tokens_and_not_over_batches(tmp_path):
    model, processor = composed()
    collate = Spa3VLMCollator(processor)
    sums = tokens = 0.0
    for row in examples():
        batch = collate([row])
        count = int((batch["labels"][:, 1:] != -100).sum())
        sums, tokens = sums + model(**batch).loss.item() * count, tokens + count
    fields = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "max_steps": 1}
    trainer(tmp_path, **fields).train()
    assert read_log(tmp_path / "log.jsonl")[0]["loss"] == pytest.approx(sums / tokens, rel=1e-5)


@pytest.mark.parametrize("policy", ("adapter_only", "end_to_end"))
def test_gradient_checkpointing_changes_nothing(policy, tmp_path):
    gradients = []
    for checkpointing in (False, True):
        watch = Watch()
        torch.manual_seed(0)
        fields = {"gradient_checkpointing": checkpointing, "max_steps": 1, "callbacks": [watch]}
        trainer(tmp_path / str(checkpointing), policy=policy, **fields).train()
        gradients.append(watch.gradients)
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_step_of_text_only_leaves_no_parameter_without_a_gradient(tmp_path):
    """Distributed training would wait for it."""
    watch = Watch()
    text = examples(2, shapes=((0, 2), (0, 3)))
    ours = trainer(tmp_path, data=text, policy="end_to_end", callbacks=[watch], max_steps=1)
    ours.train()
    assert watch.gradients.keys() == {name for name, p in ours.model.named_parameters() if p.requires_grad}


def test_the_guard_against_forgetting_reaches_the_encoder_and_no_further(tmp_path):
    """The gradient is that of both losses; decoder, heads and probe stay as they are."""
    results = {}
    for weight in (0.0, 100.0):
        model, processor = composed()
        psfm, _ = embedded_spa3r()
        psfm.spa3r = model.spa3r
        watch = Watch()
        fields = {"policy": "end_to_end", "psfm_weight": weight, "psfm": psfm, "callbacks": [watch], "max_steps": 1}
        fields["max_grad_norm"] = 0.0
        torch.manual_seed(0)
        before = {name: parameter.clone() for name, parameter in model.spa3r.named_parameters()}
        trainer(tmp_path / str(weight), model=model, processor=processor, **fields).train()
        results[weight] = watch.gradients
        frozen = [name for name in before if not name.startswith("encoder.")]
        assert all(torch.equal(before[name], model.spa3r.get_parameter(name)) for name in frozen)
    without, guarded = results[0.0], results[100.0]
    assert without.keys() == guarded.keys()
    for name, gradient in without.items():
        is_encoder = name.startswith("spa3r.encoder.")
        assert (relative_error(guarded[name], gradient) > 1e-3) == is_encoder, name
    line = read_log(tmp_path / "100.0" / "log.jsonl")[0]
    assert line["psfm"] > 0 and line["loss"] == pytest.approx(line["answers"] + line["psfm"])


def test_step_that_is_not_finite_is_dropped_and_its_rows_are_named(tmp_path):
    ours = trainer(tmp_path, max_steps=2, max_nonfinite_steps=1)
    broken, seen = ours.get_batch_samples, []

    def with_nan(*args):
        batches, tokens = broken(*args)
        seen.append(batches[0]["rows"])
        if len(seen) == 1:
            batches[0]["view_pixel_values"][:] = float("nan")
        return batches, tokens

    ours.get_batch_samples = with_nan
    before = {name: parameter.clone() for name, parameter in ours.model.named_parameters()}
    first = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                first.extend(name for name, p in model.named_parameters() if not torch.equal(p, before[name]))

    ours.add_callback(Look())
    ours.train()
    (line,) = [line for line in read_log(tmp_path / "log.jsonl") if "nonfinite_step" in line]
    assert line["nonfinite_step"] == 1 and line["nonfinite_rows"] == ", ".join(sorted(seen[0]))
    assert first == [] and ours.nonfinite_steps == 1


QUICK = ("qwen2_5_vl", "qwen3_vl", "internvl")
OTHERS = [name for name in FAMILIES if name not in QUICK and FAMILIES[name].chats]


@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_every_family_divides_by_the_tokens_of_the_step_and_takes_low_rank_updates(family, tmp_path):
    """A family that didn't would weight batches alike; a plain trainer's batches go through as they come."""
    vlm, processor = build(family)
    model = Spa3VLMForConditionalGeneration.from_vlm_and_spa3r(vlm, Spa3RModel(spa3r_config()))
    views = Spa3RImageProcessor(patch_size=PATCH, size=56)
    processor = Spa3VLMProcessor(processor, views, image_token_id=vlm.config.image_token_id)
    batch = Spa3VLMCollator(processor)(examples(2, shapes=((1, 2), (2, 3))))
    tokens = int((batch["labels"][:, 1:] != -100).sum())
    with torch.no_grad():
        mean, half = model(**batch).loss, model(**batch, num_items_in_batch=2 * tokens).loss
    torch.testing.assert_close(2 * half, mean)
    low_rank = apply_policy(model, arguments(tmp_path, policy="lora"))
    vision = {id(parameter) for parameter in model.vision_parameters()}
    learns = [p for name, p in low_rank.named_parameters() if ".lora_" in name]
    assert learns and all(p.requires_grad and id(p) not in vision for p in learns)
    assert not [name for name, _ in low_rank.named_parameters() if ".lora_" in name and ".vlm." not in name]


# Data -----------------------------------------------------------------------------------------------------------------


def names(batch: list[dict]) -> dict:
    return {"names": [row["row"] for row in batch]}


@pytest.mark.parametrize("workers", (0, 2, 3))
def test_order_is_known_beforehand_whatever_the_workers_do(workers):
    rows = [{"row": str(row)} for row in range(11)]
    batches = InstructionBatches(rows, names, 2, seed=3)
    loader = DataLoader(batches, batch_size=None, num_workers=workers)
    epochs = []
    for epoch in range(2):
        batches.set_epoch(epoch)
        epochs.append([name for batch in loader for name in batch["names"]])
    assert epochs[0] != epochs[1] and all(
        sorted(set(epoch), key=int) == [str(n) for n in range(11)] for epoch in epochs
    )
    assert len(epochs[0]) == 12 and len(batches) == 6  # one row comes once more
    batches.skip_batches(3)
    assert [name for batch in loader for name in batch["names"]] == epochs[1][6:]


def test_processes_share_the_rows_of_one():
    rows = [{"row": str(row)} for row in range(8)]
    one = [batch["names"] for batch in InstructionBatches(rows, names, 4)]
    shares = [list(InstructionBatches(rows, names, 2, rank=rank, world_size=2)) for rank in range(2)]
    assert one == [a["names"] + b["names"] for a, b in zip(*shares)]


class Lengths(list):
    lengths = [5, 1, 9, 1, 5, 9, 2, 2]


def test_rows_of_like_length_go_together():
    rows = Lengths({"row": str(row)} for row in range(8))
    for batch in InstructionBatches(rows, names, 2, group_by_length=True, accumulate=4):
        first, second = (rows.lengths[int(name)] for name in batch["names"])
        assert first == second
    with pytest.raises(ValueError, match=r"`group_by_length` needs a data set with `lengths`"):
        InstructionBatches(list(rows), names, 2, group_by_length=True)


def test_streamed_rows(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from examples(7)

    batches = InstructionBatches(Stream(), names, 2)
    loaded = [name for batch in DataLoader(batches, batch_size=None, num_workers=2) for name in batch["names"]]
    assert loaded == [f"row-{row}" for row in range(6)]
    with pytest.raises(ValueError, match=r"`max_steps` must be given where the rows are streamed"):
        trainer(tmp_path, data=Stream(), max_steps=-1)
    ours = trainer(tmp_path, data=Stream(), max_steps=4, dataloader_num_workers=4)
    assert ours.args.dataloader_num_workers == 1
    ours.train()  # into a second epoch
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl") if "loss" in line] == [1, 2, 3, 4]


def test_rows_that_can_not_be_used_are_counted_and_too_many_are_an_error(tmp_path):
    rows = examples(24)
    rows[5]["messages"] = rows[5]["messages"][:1]  # no answer
    rows[7]["skipped"] = [{"source": "hand", "scene": "row-99", "picture": "x.mp4", "reason": "it can't be decoded"}]
    ours = trainer(tmp_path, data=rows, max_steps=12)
    ours.train()
    entries = {(entry["scene"], entry["picture"]): entry["reason"] for entry in ours.skipped_by_all().entries()}
    assert entries == {("row-5", ""): "it has no words of an assistant", ("row-99", "x.mp4"): "it can't be decoded"}
    assert sum(line.get("skipped_rows", 0) for line in read_log(tmp_path / "log.jsonl")) == 2
    for row in rows[::2]:
        row["messages"] = row["messages"][:1]
    with pytest.raises(ValueError, match=r"`max_bad_share` = 0\.05"):
        trainer(tmp_path / "bad", data=rows, max_steps=12).train()


def test_one_bad_row_does_not_end_a_training(tmp_path):
    """Whatever is wrong shows where a batch is made, long after the row was read."""
    rows = examples(8)
    rows[1]["messages"][1]["content"][0]["text"] = "It is <|im_end|>"
    rows[2]["messages"][0]["content"].insert(0, {"type": "image", "image": PIL.Image.new("RGB", (13, 50))})
    rows[4]["messages"][0]["content"][0] = "How many?"
    ours = trainer(tmp_path, rows, max_steps=4)
    ours.train_dataset.max_bad_share = 0.5
    ours.train()
    entries = {entry["scene"]: entry["reason"] for entry in ours.skipped_by_all().entries()}
    assert set(entries) == {"row-1", "row-2", "row-4"}
    assert (
        "<|im_end|>" in entries["row-1"] and "14 x 14 pixels" in entries["row-2"] and "dictionary" in entries["row-4"]
    )


def test_an_epoch_is_counted_in_steps(tmp_path):
    ours = trainer(tmp_path, data=examples(8), max_steps=-1, num_train_epochs=1.5, gradient_accumulation_steps=2)
    assert ours.args.max_steps == 3  # 4 batches an epoch


# Evaluation -----------------------------------------------------------------------------------------------------------


def test_answers_are_scored_while_training(tmp_path):
    questions = examples(3, shapes=((2, 1), (0, 1), (1, 1)))
    ours = trainer(
        tmp_path,
        eval_dataset=questions,
        evaluation={"max_new_tokens": 2, "batch_size": 2},
        eval_strategy="steps",
        eval_steps=1,
    )
    ours.train()
    lines = [line for line in read_log(tmp_path / "log.jsonl") if "eval_overall" in line]
    assert [line["step"] for line in lines] == [1, 2]
    assert set(lines[0]) >= {"eval_overall", "eval_object_counting_MRA:.5:.95:.05"}
    assert all(0 <= value <= 100 for line in lines for key, value in line.items() if key.startswith("eval_"))
    assert ours.model.vlm.get_decoder().training and not ours.model.spa3r.training  # as before it was asked
    with pytest.raises(ValueError, match=r"`eval_dataset` must hold questions"):
        trainer(tmp_path).evaluate()


# Checkpoints ----------------------------------------------------------------------------------------------------------


def test_one_bad_question_does_not_end_a_training(tmp_path, caplog):
    questions = examples(3, shapes=((0, 1), (0, 1), (0, 1)))
    questions[1]["messages"][0]["content"][0]["text"] = "What is <|image_pad|>?"
    ours = trainer(tmp_path, eval_dataset=questions, evaluation={"max_new_tokens": 1, "batch_size": 3})
    with caplog.at_level("WARNING"):
        assert "eval_overall" in ours.evaluate()
    assert "1 of 3 held-out questions can't be asked; the first is 'row-1': ValueError: The text of" in caplog.text
    with pytest.raises(ValueError, match="1 of 1 held-out questions can't be asked"):
        ours.evaluate(questions[1:2])


def test_lora_checkpoint_is_small_loads_and_merges(tmp_path):
    ours = trainer(tmp_path, policy="lora", lora_rank=2, max_steps=2, save_strategy="steps", save_steps=2)
    ours.train()
    ours.save_model()
    saved = {file: os.path.getsize(tmp_path / file) for file in os.listdir(tmp_path) if "adapter_" in file}
    assert saved.keys() == {"adapter_model.safetensors", "adapter_config.json"}
    learned = sum(p.numel() for p in ours.model.parameters() if p.requires_grad)
    assert saved["adapter_model.safetensors"] < 4 * learned * 1.2
    same_files(tmp_path, tmp_path / "checkpoint-2", "adapter_model.safetensors")
    fresh, processor = composed()
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    batch = Spa3VLMCollator(processor)([example(0), example(1), example(3)])
    del batch["labels"]
    with torch.no_grad():
        trained = ours.model.eval()(**batch).logits
        before = loaded(**batch).logits
        untrained = composed()[0](**batch).logits
        merged = loaded.merge_and_unload()
        after = merged(**batch).logits
    assert relative_error(before, trained) < 1e-6 and relative_error(after, before) < 1e-5
    assert relative_error(untrained, trained) > 1e-3
    merged.save_pretrained(tmp_path / "merged")
    whole = type(merged).from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert relative_error(whole(**batch).logits, before) < 1e-5


@pytest.mark.parametrize(
    ("policy", "workers"),
    [
        ("paper", 0),
        pytest.param("lora", 2, marks=pytest.mark.slow),
        pytest.param("end_to_end", 0, marks=pytest.mark.slow),
    ],
)
def test_resumed_run_ends_in_the_same_weights_and_log(policy, workers, tmp_path):
    """Killed in the second epoch, in the middle of what an epoch's batches are accumulated to."""
    fields = {"policy": policy, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lora_dropout": 0.1}
    fields |= {"gradient_accumulation_steps": 2, "dataloader_num_workers": workers, "data": examples(6)}

    def ready(folder, **more):
        model, processor = composed()
        torch.manual_seed(0)
        return trainer(folder, model=realigned(model), processor=processor, **(fields | more))

    ready(tmp_path / "whole").train()
    with pytest.raises(InterruptedError):
        ready(tmp_path / "parts", callbacks=[Kill(3)]).train()
    (checkpoint,) = checkpoints_in(tmp_path / "parts")
    resumed = ready(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    weights = "adapter_model.safetensors" if policy == "lora" else "model.safetensors"
    for name in (weights, "optimizer.safetensors"):
        same_files(tmp_path / "parts" / "checkpoint-4", tmp_path / "whole" / "checkpoint-4", name)
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("parts", "whole")]
    ours, theirs = ([(line["step"], line["loss"]) for line in log if "loss" in line] for log in logs)
    assert ours == theirs and [step for step, _ in ours] == [1, 2, 3, 4]
    files = [file for file in (tmp_path / "parts" / "checkpoint-4").rglob("*") if file.is_file()]
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_saved_model_is_whole_and_answers_like_the_trained_one(tmp_path):
    ours = trainer(tmp_path, policy="paper", save_strategy="steps", save_steps=2)
    ours.train()
    ours.save_model()
    model, processor = (kind.from_pretrained(tmp_path) for kind in (Spa3VLMForConditionalGeneration, Spa3VLMProcessor))
    batch = Spa3VLMCollator(processor)([example(0), example(1)])
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, ours.model.eval()(**batch).loss)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "spa3_vlm"
