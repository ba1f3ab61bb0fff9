"""Trainers of others on a Spa3-VLM: TRL's SFTTrainer, transformers' Seq2SeqTrainer, compiled training."""

import importlib.util

import datasets
import PIL.Image
import pytest
import torch
from peft import LoraConfig
from tiny_finetuning import composed, examples
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from spa3r.data import Spa3VLMCollator

needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
PICTURES = [PIL.Image.new("RGB", (56, 56), (40 * n, 90, 200)) for n in range(3)]
QUESTION = {"role": "user", "content": "How many chairs?"}
ANSWER = {"role": "assistant", "content": "2"}
ITEMS = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "How many chairs?"}]
ROWS = {
    "messages": {"images": PICTURES[:1], "messages": [QUESTION, ANSWER]},
    "messages of items": {
        "images": PICTURES[:2],
        "messages": [
            {"role": "user", "content": ITEMS},
            {"role": "assistant", "content": [{"type": "text", "text": "2"}]},
        ],
    },
    "prompt and completion": {"images": PICTURES[:1], "prompt": [QUESTION], "completion": [ANSWER]},
}


def sft(folder, rows, model, processor, **kwargs):
    from trl import SFTConfig, SFTTrainer

    fields = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "max_length": None}
    fields |= {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}
    return SFTTrainer(
        model=model,
        args=SFTConfig(str(folder), **fields),
        train_dataset=datasets.Dataset.from_list([rows] * 4),
        processing_class=processor,
        **kwargs,
    )


@needs_trl
@pytest.mark.parametrize("kind", ROWS)
def test_trls_sft_trains_the_adapter(kind, tmp_path):
    model, processor = composed()
    seen = []
    model.spa3r.encoder.register_forward_hook(lambda *args: seen.append(1))
    before = model.adapter.gate.weight.clone()
    trainer = sft(tmp_path, ROWS[kind], model, processor)
    assert 0 < trainer.train().training_loss < 20
    assert seen and not torch.equal(model.adapter.gate.weight, before)


@needs_trl
def test_trls_sft_takes_low_rank_updates_and_its_loss_is_the_models(tmp_path):
    model, processor = composed()
    lora = LoraConfig(r=2, target_modules=r"vlm\..*language_model.*\.(q|v)_proj", modules_to_save=["adapter"])
    trainer = sft(tmp_path, ROWS["prompt and completion"], model, processor, peft_config=lora)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.eval()
    with torch.no_grad():
        expected = model(**{key: value for key, value in batch.items() if key != "num_items_in_batch"}).loss
        loss = trainer.compute_loss(trainer.model, dict(batch))
    assert abs(loss - expected) < 1e-4
    trainer.train()


def test_a_collated_batch_is_answered(tmp_path):
    """As its prompts alone are; and by Seq2SeqTrainer, whose loss is that of the answers."""
    model, processor = composed()
    rows = examples(4, shapes=((2, 3), (1, 9), (3, 2), (0, 1)))  # the order that a batch has
    rows[1]["messages"] = rows[0]["messages"][:2] + rows[1]["messages"]  # an earlier answer belongs to the prompt
    collator = Spa3VLMCollator(processor)
    batch = collator(rows)
    words = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    answers = model.generate(**batch, **words)[:, batch["input_ids"].shape[1] :]
    prompts = processor.apply_chat_template(
        [row["messages"][:-1] for row in rows], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    assert torch.equal(answers, model.generate(**prompts, **words)[:, prompts["input_ids"].shape[1] :])
    args = Seq2SeqTrainingArguments(
        str(tmp_path),
        predict_with_generate=True,
        per_device_eval_batch_size=4,
        remove_unused_columns=False,
        use_cpu=True,
        report_to=[],
    )
    trainer = Seq2SeqTrainer(model, args, data_collator=collator, eval_dataset=rows)
    predicted = trainer.predict(rows, **words)
    length = batch["input_ids"].shape[1]
    assert torch.equal(torch.from_numpy(predicted.predictions[:, length : length + 4]), answers)
    with torch.no_grad():
        assert abs(predicted.metrics["test_loss"] - model(**batch).loss) < 1e-4


def test_what_a_prompt_can_not_be_made_of():
    model, processor = composed()
    rows = examples(2, shapes=((1, 1), (0, 1)))
    rows[0]["messages"] += [{"role": "user", "content": [{"type": "image", "image": PICTURES[0]}]}]
    with pytest.raises(ValueError, match="has a picture behind its last answer"):
        model.generate(**Spa3VLMCollator(processor)(rows), max_new_tokens=1)
    # A batch without answers is one of prompts.
    nothing = Spa3VLMCollator(processor)([{"messages": rows[1]["messages"][:1]}])
    assert model.generate(**nothing, max_new_tokens=1).shape == (1, nothing["input_ids"].shape[1] + 1)


@pytest.mark.slow
def test_a_compiled_training_takes_batches_of_any_shape(tmp_path):
    torch._dynamo.reset()
    model, processor = composed()
    rows = examples(3, shapes=((2, 3), (0, 1), (1, 9)))
    fields = {"per_device_train_batch_size": 1, "max_steps": 3, "learning_rate": 1e-3, "logging_steps": 1}
    fields |= {"use_cpu": True, "report_to": [], "remove_unused_columns": False, "save_strategy": "no", "seed": 0}
    losses = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        model, processor = composed()
        arguments = TrainingArguments(str(tmp_path), **fields, **compiled)
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=Spa3VLMCollator(processor))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
