"""Every family of vision-language models combines: the composed is the plain VLM until trained, then it sees the scene.

The adapter of the `composed` has random weights, so that whatever reaches the wrong row, picture or beam changes the
words. Tolerances are relative, ||ours - reference|| / ||reference||.
"""

import pytest
import torch
import transformers
from packaging.version import Version
from tiny import alive, realigned, relative_error
from tiny_spa3_vlm import CONVERSATIONS, QUESTIONS, Composed, ComposedFamily, inputs_of, make_family, without_views
from tiny_spa3_vlm import FAMILY_WORDS as WORDS
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    TextIteratorStreamer,
)
from transformers.generation import BaseStreamer
from vlm_families import FAMILIES, MORE_FAMILIES, image_features, without_pixels

from spa3r import Spa3VLMForConditionalGeneration, Spa3VLMProcessor

EXPERT_BIAS = "e_score_correction_bias"
"""It only chooses experts and has no gradient. In some families it stays in float32, as does the router."""

# Two processors of transformers still use an old protocol of NumPy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


MORE = [pytest.param(name, marks=pytest.mark.slow) for name in MORE_FAMILIES]
in_the_first_families = pytest.mark.parametrize("composed", FAMILIES, indirect=True)
in_the_other_families = pytest.mark.parametrize("composed", MORE, indirect=True)


@pytest.fixture(scope="module", params=[*FAMILIES, *MORE])
def composed(request) -> ComposedFamily:
    return make_family(request.param)


@torch.no_grad()
def decode_step_by_step(
    composed: ComposedFamily, inputs: dict, cached: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Greedy decoding of one row as it is defined: the best next token (no special one), again and again."""
    inputs, ids, all_logits = dict(inputs), inputs["input_ids"], []
    per_token = [key for key, value in inputs.items() if torch.is_tensor(value) and value.shape == ids.shape]
    step = inputs
    for _ in range(WORDS):
        output = composed.model(**step, use_cache=cached)
        all_logits.append(output.logits[:, -1])
        allowed = output.logits[:, -1].clone()
        allowed[:, composed.special_tokens] = -torch.inf
        ids = torch.cat([ids, allowed.argmax(-1, keepdim=True)], 1)
        for key in per_token:
            # (PaliGemma) what follows the prompt is causal and of type 1.
            one = key == "attention_mask" or (composed.name == "paligemma" and key == "token_type_ids")
            more = ids[:, -1:] if key == "input_ids" else torch.full_like(ids[:, -1:], one)
            inputs[key] = torch.cat([inputs[key], more], 1)
        step = {"input_ids": ids[:, -1:], "past_key_values": output.past_key_values} if cached else inputs
    return ids[:, -WORDS:], all_logits


def labels_of(composed: ComposedFamily) -> torch.Tensor:
    """Every word of the prompts."""
    ids, mask = composed.batch["input_ids"], composed.batch["attention_mask"].bool()
    return ids.masked_fill(~mask | (ids == composed.model.vlm.config.image_token_id), -100)


# Before training ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_untouched_it_is_the_plain_vlm_to_the_bit(composed, tmp_path):
    fresh = Spa3VLMForConditionalGeneration.from_vlm_and_spa3r(composed.model.vlm, composed.model.spa3r)
    plain, labels = without_views(composed.batch), labels_of(composed)
    reference = composed.model.vlm(**plain, labels=labels)
    output, logits = fresh(**composed.batch, labels=labels), reference.logits
    assert torch.equal(output.logits, logits) and torch.equal(output.loss, reference.loss)

    # Of a row with one picture: the copies of a row with more see wrong pictures in some families (GLM) left alone.
    row = composed.alone[1]
    kinds = [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2, "top_k": 0, "temperature": 2.0}]
    for kwargs in kinds if composed.name in FAMILIES else kinds[-1:]:
        words, plain = [], without_views(row)
        if composed.name.startswith("qwen3_5") and Version(transformers.__version__) < Version("5.21"):
            # The plain VLM repeats the pixels of copies in a wrong order there, and the tokens of pictures rightly.
            features = image_features(composed.model.vlm, plain)
            plain = without_pixels(plain) | {"mm_encoder_outputs": {"image": features}}
        for model, inputs in ((fresh, row), (composed.model.vlm, plain)):
            torch.manual_seed(3)
            words.append(composed.generate(inputs, model, **kwargs).words)
        assert torch.equal(*words), kwargs
    assert not torch.equal(*words[0])

    fresh.save_pretrained(tmp_path)
    composed.processor.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is Spa3VLMForConditionalGeneration and not any(info.values())
    assert type(loaded.vlm) is type(composed.model.vlm)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is Spa3VLMProcessor and type(processor.vlm_processor) is type(
        composed.processor.vlm_processor
    )
    again = inputs_of(processor, composed.conversations)
    assert again.keys() == composed.batch.keys()
    assert all(torch.equal(torch.as_tensor(again[key]), torch.as_tensor(composed.batch[key])) for key in again)
    again = realigned(again)
    assert torch.equal(realigned(loaded)(**again).logits, logits)

    half = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.adapter.parameters()} == {torch.bfloat16}
    dtypes = {p.dtype for name, p in half.vlm.named_parameters() if not name.endswith((EXPERT_BIAS, "gate.weight"))}
    assert dtypes == {torch.bfloat16}
    assert {p.dtype for p in half.spa3r.backbone.camera_head.parameters()} == {torch.float32}
    alive(half.adapter)
    inputs = {key: value.bfloat16() if torch.is_floating_point(value) else value for key, value in again.items()}
    output = half(**inputs).logits
    assert output.dtype == torch.bfloat16 and output.isfinite().all() and not torch.equal(output, logits.bfloat16())


# The scene matters ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_views_reach_the_words_of_their_own_row(composed):
    def difference(a, b):  # of the last position, by row
        return (a - b)[:, -1].abs().amax(-1)

    batch, logits = composed.batch, composed.model(**composed.batch).logits
    has_views = batch["views_per_scene"] > 0
    assert torch.equal(difference(logits, composed.model.vlm(**without_views(batch)).logits) > 1e-3, has_views)

    patches = int(batch["view_grid_hw"][:3].prod(-1).sum())  # of the first row's three views
    changed = batch["view_pixel_values"].clone()
    changed[:patches] = changed[:patches].flip(0)
    seen = difference(composed.model(**batch | {"view_pixel_values": changed}).logits, logits)
    assert seen[0] > 1e-3 and (seen[1:] == 0).all()

    counted = composed.model(**{key: value for key, value in batch.items() if key != "image_tokens_per_scene"}).logits
    assert torch.equal(counted, logits)


@torch.no_grad()
def test_a_batch_is_its_rows_alone(composed):
    logits, mask = composed.model(**composed.batch).logits, composed.batch["attention_mask"].bool()
    assert not mask.all()
    for row, inputs in enumerate(composed.alone):
        error = relative_error(logits[row][mask[row]], composed.model(**inputs).logits[0])
        assert error <= 1e-5, f"row {row}: {error:.1e}"


# Words ----------------------------------------------------------------------------------------------------------------


def test_greedy_words_are_the_definitions(composed):
    together = composed.generate(composed.batch)
    plain = composed.generate(without_views(composed.batch), composed.model.vlm)
    for row, inputs in enumerate(composed.alone):
        for cached in (False, True):
            words, logits = decode_step_by_step(composed, inputs, cached)
            assert torch.equal(together.words[row], words[0]), (row, cached)
            for ours, reference in zip(together.logits, logits, strict=True):
                assert relative_error(ours[row], reference[0]) <= 1e-5, (row, cached)
        moved = relative_error(together.logits[0][row], plain.logits[0][row])
        assert moved > 1e-3 if composed.batch["views_per_scene"][row] else moved == 0


@in_the_first_families
def test_beams_of_a_batch_are_the_beams_of_its_rows(composed):
    beams = {"num_beams": 3, "num_return_sequences": 2}
    together = composed.generate(composed.batch, **beams)
    words, scores, moved = together.words.split(2), together.sequences_scores.split(2), []
    for row, inputs in enumerate(composed.alone):
        alone = composed.generate(inputs, **beams)
        assert torch.equal(words[row], alone.words), row
        assert relative_error(scores[row], alone.sequences_scores) <= 1e-5, row
        plain = composed.generate(without_views(inputs), composed.model.vlm, **beams)
        moved.append(relative_error(alone.sequences_scores, plain.sequences_scores))
    assert len(words) == len(moved)
    assert min(moved[:2]) > 1e-4 and sum(moved[2:]) <= 1e-6


@in_the_first_families
def test_samples_of_a_row_see_its_own_scene(composed):
    """Samples with the best token only are greedy; equal seeds give equal samples, other seeds others."""
    greedy = composed.generate(composed.batch)
    sample = {"do_sample": True, "num_return_sequences": 2}
    best = composed.generate(composed.batch, top_k=1, **sample)
    assert torch.equal(best.words, greedy.words.repeat_interleave(2, 0))
    for ours, reference in zip(best.logits, greedy.logits, strict=True):
        assert relative_error(ours, reference.repeat_interleave(2, 0)) <= 1e-5
    drawn = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        drawn.append(composed.generate(composed.batch, temperature=2.0, top_k=0, **sample).words)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


class Collector(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


@in_the_first_families
def test_streamers_are_heard(composed):
    inputs, streamer = composed.alone[0], Collector()
    words = composed.generate(inputs, streamer=streamer).words[0].tolist()
    assert streamer.ended and streamer.tokens == [*inputs["input_ids"][0].tolist(), *words]
    texts = TextIteratorStreamer(composed.processor.tokenizer, skip_prompt=True)
    composed.generate(inputs, streamer=texts)
    assert "".join(texts) == composed.processor.tokenizer.decode(words)


@in_the_first_families
@torch.no_grad()
def test_the_base_model_gives_what_the_head_reads(composed):
    """Trainers that project hidden states themselves call it in place of the model."""
    read = []
    head = composed.model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    composed.model(**composed.batch)
    handle.remove()
    states = composed.model.base_model(**composed.batch).last_hidden_state
    assert relative_error(states, read[0]) < 1e-6
    assert composed.model.base_model is not composed.model and not [*composed.model.base_model.parameters()]


@in_the_other_families
def test_questions_about_an_encoded_scene_are_answered_as_alone(composed):
    """Those of the first families are in `test_spa3_vlm_scenes`."""
    asked = Composed(composed.model, composed.processor)
    scene = asked.encode()
    assert asked.ask(scene, QUESTIONS[:3]) == asked.alone(QUESTIONS[:3])


@pytest.mark.slow
@pytest.mark.parametrize("integration", ["cross_attention", "append"])
@torch.no_grad()
def test_a_compiled_model_takes_scenes_of_any_shape(integration):
    torch._dynamo.reset()
    composed = make_family(integration=integration)
    model, processor = composed.model, composed.processor
    compiled = torch.compile(model, backend="eager")
    for conversations in ([CONVERSATIONS[2]], [CONVERSATIONS[1]], [CONVERSATIONS[0]], CONVERSATIONS[:2]):
        batch = processor.apply_chat_template(conversations, tokenize=True, return_dict=True)
        assert relative_error(compiled(**batch).logits, model(**batch).logits) < 1e-5


# Training -------------------------------------------------------------------------------------------------------------


def test_gradients_reach_adapter_and_language_model_and_nothing_else(composed):
    model = composed.model.train()
    frozen = [*model.spa3r.parameters(), *model.vision_parameters()]
    assert not any(parameter.requires_grad for parameter in frozen)
    assert model.training and model.vlm.get_decoder().training and model.adapter.training
    assert not any(module.training for part in (model.spa3r, *model.vision_modules()) for module in part.modules())

    loss = model(**composed.batch, labels=labels_of(composed)).loss
    assert loss.isfinite()
    loss.backward()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    # A softmax doesn't see what is added to all keys alike, so this one's gradient is rounding error.
    assert model.adapter.cross_attention.k_norm.bias.grad is not None
    names.pop(id(model.adapter.cross_attention.k_norm.bias))
    names = {key: name for key, name in names.items() if not name.endswith(EXPERT_BIAS)}
    trained = {id(parameter) for parameter in model.parameters()} - {id(parameter) for parameter in frozen}
    assert trained >= {id(parameter) for parameter in model.adapter.parameters()}
    silent = [
        name
        for key, name in names.items()
        if key in trained
        and not ((p := model.get_parameter(name)).requires_grad and p.grad is not None and p.grad.any())
    ]
    touched = [names[id(parameter)] for parameter in frozen if parameter.grad is not None]
    model.zero_grad()
    model.eval()
    assert (silent, touched) == ([], [])
