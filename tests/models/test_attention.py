"""Packed attention: every back end against one dense definition, what is never built, and how a back end is chosen."""

import importlib.util
import logging
from contextlib import nullcontext

import pytest
import torch
from attention_definition import SEGMENTS, Caller, dense_definition, tensors
from tiny import (
    BACK_ENDS,
    TARGETS,
    alive,
    back_ends_in_use,
    depth_anything_3_config,
    pretraining_config,
    relative_error,
    spa3r_config,
    vggt_config,
    view_inputs,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from spa3r import DepthAnything3Model, Spa3RForPreTraining, Spa3RModel, VggtModel
from spa3r.models import attention
from spa3r.models.attention import Segments, check_attention_implementation, packed_attention


def assert_is_the_definition(attend, segments: Segments, tolerance: float = 1e-5, **sizes) -> None:
    """`attend(query, key, value)` and its gradients equal the dense definition's."""
    inputs = tensors(segments, **sizes)
    output = attend(*inputs)
    wanted = dense_definition(*inputs, segments)
    assert relative_error(output, wanted) <= tolerance and output.dtype == inputs[0].dtype
    cotangent = torch.randn_like(output)
    ours = torch.autograd.grad(output, inputs, cotangent)
    for gradient, reference in zip(ours, torch.autograd.grad(wanted, inputs, cotangent.double())):
        assert relative_error(gradient, reference) <= tolerance


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_every_back_end_is_the_dense_definition_forward_and_backward(back_end, segments):
    assert_is_the_definition(lambda *qkv: packed_attention(Caller(back_end), *qkv, segments), segments)


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_calls_of_xformers_mean_the_dense_definition(segments, monkeypatch):
    """What reaches xformers on CUDA (layout, ragged mask, scale), with a definition in place of its kernels."""
    ops = pytest.importorskip("xformers.ops")

    def definition(query, key, value, attn_bias=None, scale=None):  # each (B, S, heads, head_dim)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
        if attn_bias is not None:
            scores = scores + attn_bias.materialize(scores.shape[-2:])
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)

    monkeypatch.setattr(ops, "memory_efficient_attention", definition)

    def attend(query, key, value):
        keys, values = segments.gather_keys(key), segments.gather_keys(value)
        return attention._xformers_attention(query, keys, values, segments, query.shape[-1] ** -0.5)

    assert_is_the_definition(attend, segments)


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_variable_length_calls_mean_the_dense_definition(segments):
    """What reaches a flash kernel (offsets and longest segment), with a definition in its place."""

    def kernel(module, query, key, value, attention_mask, scaling, dropout, is_causal, **kwargs):
        assert (attention_mask, dropout, is_causal) == (None, 0.0, False)
        ends_q, ends_k = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]
        assert ends_q.dtype == ends_k.dtype == torch.int32
        lengths_q, lengths_k = ends_q.diff().tolist(), ends_k.diff().tolist()
        assert (max(lengths_q), max(lengths_k)) == (kwargs["max_length_q"], kwargs["max_length_k"])
        qkv = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return dense_definition(*qkv, Segments.across(lengths_q, lengths_k), scaling).float()[None], None

    def attend(query, key, value):
        keys, values = segments.gather_keys(key), segments.gather_keys(value)
        return attention._varlen_flash_attention(kernel, None, query, keys, values, segments, query.shape[-1] ** -0.5)

    assert_is_the_definition(attend, segments)


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_scaling_is_the_callers(back_end):
    segments = SEGMENTS["ragged"]
    inputs = tensors(segments)
    ours = packed_attention(Caller(back_end), *inputs, segments, scaling=0.7)
    assert relative_error(ours, dense_definition(*inputs, segments, 0.7)) <= 1e-5


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_half_precision_keeps_its_dtype(back_end, dtype):
    segments = SEGMENTS["overlapping"]
    inputs = tensors(segments, dtype=dtype)
    ours = packed_attention(Caller(back_end), *inputs, segments)
    assert ours.dtype == dtype and relative_error(ours, dense_definition(*inputs, segments)) <= 2e-2


# Segments -------------------------------------------------------------------------------------------------------------


def test_segments_know_their_shape():
    facts = {name: (s.keys_are_packed, s.is_uniform, s.groups) for name, s in SEGMENTS.items()}
    assert facts == {
        "uniform": (True, True, ((0, 1, 2),)),
        "ragged": (True, False, ((0, 3), (1,), (2,))),
        "one": (True, True, ((0,),)),
        "uniform cross": (True, True, ((0, 1),)),
        "ragged cross": (True, False, ((0,), (1,), (2,))),
        "overlapping": (False, False, ((0,), (1,), (2,), (3,))),
        "overlapping, of one shape": (False, False, ((0, 1),)),
        "with a gap": (False, False, ((0,), (1,))),
    }
    assert SEGMENTS["overlapping"].key_lengths == (5, 9, 2, 8)
    assert Segments.within([2, 3]) == Segments.across((2, 3), (2, 3)) and hash(Segments.within([2, 3]))


def test_keys_are_gathered_only_where_they_must_be():
    keys = torch.arange(17)
    gathered = SEGMENTS["ragged"].gather_keys(keys)
    assert gathered.tolist() == list(range(15)) and gathered.data_ptr() == keys.data_ptr()
    assert SEGMENTS["ragged"].gather_keys(gathered) is gathered
    later = Segments((2, 2), ((3, 4), (7, 2))).gather_keys(keys)  # consecutive from elsewhere
    assert later.tolist() == [3, 4, 5, 6, 7, 8] and later.data_ptr() == keys[3:].data_ptr()
    assert SEGMENTS["with a gap"].gather_keys(keys).tolist() == [4, 5, 6, 7, 8, 0, 1]


def test_unpaired_segments_are_refused():
    with pytest.raises(ValueError, match=r"`query_lengths` and `key_lengths` pair up.*got 2 query and 1 key segments"):
        Segments.across([1, 2], [3])


# What is never done ---------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Notes the largest tensor that any operation makes, and the operations that read values back to the host."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.largest, self.reads = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        if any(name in str(function) for name in self.READS):
            self.reads.append(str(function))
        return result


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_no_dense_square_is_built(back_end):
    """Forward and backward of ragged and overlapping segments: no tensor of S x S numbers."""
    for segments in (
        Segments.within([300, 200, 250, 274]),
        Segments((400, 112, 300, 212), ((0, 400), (0, 512), (512, 300), (512, 512))),
    ):
        total = sum(segments.query_lengths)
        inputs = tensors(segments, heads=1)
        with Watch() as watch:
            packed_attention(Caller(back_end), *inputs, segments).sum().backward()
        assert total * 16 <= watch.largest < total**2
    with Watch() as watch:  # the watch sees what it looks for
        torch.ones(total, 1) @ torch.ones(1, total)
    assert watch.largest == total**2


def run_everything(device: str = "cpu") -> list[torch.Tensor]:
    """Forward passes of all models, layouts and masks as lists."""
    inputs = view_inputs(targets=TARGETS)
    lists = {key: value.tolist() for key, value in inputs.items() if key != "view_pixel_values"}
    pixels = inputs["view_pixel_values"].to(device)
    vggt = VggtModel(vggt_config()).to(device).eval()
    depth_anything_3 = DepthAnything3Model(depth_anything_3_config()).to(device).eval()
    spa3r = Spa3RModel(spa3r_config()).to(device).eval()
    pretraining = Spa3RForPreTraining(pretraining_config()).to(device).eval()
    mask = lists.pop("target_mask")
    everything = {"output_cameras": True, "output_depth": True, "output_points": True}
    with torch.no_grad(), Watch() as watch:
        outputs = [
            vggt(pixels, **lists, **everything).world_points[0],
            depth_anything_3(pixels, **lists, output_cameras=True, output_depth=True).depth[0],
            spa3r(pixels, **lists).geometry_features,
            pretraining(pixels, **lists, target_mask=mask).loss,
        ]
    return [watch.reads, *outputs]


def test_a_forward_pass_reads_nothing_back_to_the_host():
    reads, *outputs = run_everything()
    assert reads == [] and all(output.isfinite().all() for output in outputs)
    with Watch() as watch:  # the watch sees what it looks for
        torch.ones(()).item()
    assert watch.reads


def test_a_forward_pass_needs_no_values(monkeypatch):
    """On the meta device, which doesn't know autocast, there is nothing that could be read."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    _, *outputs = run_everything("meta")
    assert [output.device.type for output in outputs] == ["meta"] * 4


# The choice of a back end ---------------------------------------------------------------------------------------------


def pretend_missing(monkeypatch, *packages):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in packages else find(name, *a))


@pytest.mark.parametrize("missing, default", (((), "xformers"), (("xformers",), "sdpa")))
def test_default_is_xformers_where_it_is_installed(missing, default, monkeypatch):
    pytest.importorskip("xformers")
    pretend_missing(monkeypatch, *missing)
    assert back_ends_in_use(Spa3RModel(spa3r_config())) == {p: {default} for p in ("backbone", "encoder", "decoder")}


def test_xformers_whose_compiled_part_is_not_loaded_is_not_used_on_cuda(monkeypatch, request):
    """It imports then, and refuses every kernel: with torch 2.11 and CUDA 13, xformers 0.0.35 does."""
    pytest.importorskip("xformers.ops.fmha")  # before a GPU is pretended, which its import would ask
    library = importlib.import_module("xformers._cpp_lib")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(library, "_built_with_cuda", False)
    attention._xformers_fault.cache_clear()
    request.addfinalizer(attention._xformers_fault.cache_clear)
    assert check_attention_implementation(None) == "sdpa"
    with pytest.raises(ImportError, match=r"built for other versions of PyTorch or CUDA .*: use .*sdpa"):
        check_attention_implementation("xformers")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    VggtModel(vggt_config()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "name, missing, error, words",
    [
        ("turbo", (), ValueError, r"must be one of \['eager', .*'xformers'.*\], got 'turbo'"),
        ("flash_attention_2", ("flash_attn",), ImportError, r"flash-attn is not installed: use .*'xformers' or 'sdpa'"),
        ("xformers", ("xformers",), ImportError, r"can't be used here: .*`pip install xformers`, or use .*='sdpa'"),
    ],
)  # fmt: skip
def test_an_unusable_back_end_is_refused_at_load(name, missing, error, words, checkpoint, monkeypatch):
    pretend_missing(monkeypatch, *missing)
    with pytest.raises(error, match=words):
        VggtModel.from_pretrained(checkpoint, attn_implementation=name)
    with pytest.raises(error, match=words):
        check_attention_implementation(name)
    with pytest.raises(error, match=words):
        VggtModel(vggt_config()).set_attn_implementation(name)


def test_flash_attention_needs_cuda(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *args: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ImportError, match="it runs on CUDA devices only: use attn_implementation='sdpa' here"):
        check_attention_implementation("flash_attention_2")


def test_an_unregistered_name_is_refused_by_packed_attention():
    segments = SEGMENTS["one"]
    caller = Caller("sdpa")
    caller.config._attn_implementation_internal = "turbo"
    with pytest.raises(KeyError, match="turbo"):
        packed_attention(caller, *tensors(segments), segments)


def test_xformers_without_cuda_says_so_once(caplog):
    type(attention.logger).info_once.cache_clear()
    segments = SEGMENTS["ragged"]
    with caplog.at_level(logging.INFO, attention.logger.name):
        for _ in range(3):
            packed_attention(Caller("xformers"), *tensors(segments), segments)
    said = [record for record in caplog.records if "xformers' kernels run on CUDA only" in record.message]
    assert len(said) == 1 and said[0].levelno == logging.INFO  # nothing is wrong: the default is used without CUDA, too
    assert "on cpu tensors PyTorch's scaled-dot-product attention computes the same" in said[0].message


def test_any_registered_back_end_runs_in_groups():
    """A name that transformers was taught is called as ``sdpa`` is, each segment alone."""
    calls = []

    def mine(module, query, key, value, attention_mask, **kwargs):
        calls.append((query.shape[0], query.shape[2], key.shape[2]))
        return attention.eager_attention_forward(module, query, key, value, attention_mask, kwargs["scaling"])

    attention.AttentionInterface.register("mine", mine)
    try:
        segments = SEGMENTS["ragged"]
        assert_is_the_definition(lambda *qkv: packed_attention(Caller("mine"), *qkv, segments), segments)
    finally:
        del attention.AttentionInterface._global_mapping["mine"]
    assert calls == [(2, 3, 3), (1, 1, 1), (1, 8, 8)]


@torch.no_grad()
def test_xformers_serves_a_language_model_of_transformers(tmp_path):
    """A causal model with left padding: the same logits as with SDPA, in one pass and token by token."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    model = alive(LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)))
    model.save_pretrained(tmp_path)
    tokens = torch.randint(3, 50, (2, 9))
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    logits, texts = {}, {}
    for name in ("sdpa", "xformers"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
        assert model.config._attn_implementation == name
        logits[name] = model(tokens, attention_mask=mask).logits
        texts[name] = model.generate(tokens, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert relative_error(logits["xformers"][mask.bool()], logits["sdpa"][mask.bool()]) <= 1e-6
    assert torch.equal(texts["xformers"], texts["sdpa"])
    alone = model(tokens[:1, 4:]).logits
    assert relative_error(logits["xformers"][:1, 4:], alone) <= 1e-5


def test_offsets_made_while_inferring_can_be_trained_with():
    lengths = (3, 1, 7)
    attention._cumulative_lengths.cache_clear()
    with torch.inference_mode():
        offsets = attention._cumulative_lengths(lengths, torch.device("cpu"))
    assert offsets.tolist() == [0, 3, 4, 11] and not offsets.is_inference()


def test_flash_attention_leaves_float32_to_pytorch(monkeypatch):
    """The camera head is always float32, which flash attention doesn't know."""
    monkeypatch.setattr(attention, "_varlen_flash_attention", lambda *args: pytest.fail("called with float32"))
    tokens = torch.randn(6, 2, 8)
    segments = Segments.within((2, 4))
    ours = packed_attention(Caller("flash_attention_2"), tokens, tokens, tokens, segments)
    assert torch.equal(ours, packed_attention(Caller("sdpa"), tokens, tokens, tokens, segments))


def test_back_ends_of_a_paged_cache_are_refused():
    with pytest.raises(ValueError, match=r"`attn_implementation` must be one of .* got 'paged\|eager'"):
        attention.check_attention_implementation("paged|eager")
