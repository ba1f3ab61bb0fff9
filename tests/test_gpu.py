"""On a CUDA device: xformers' kernels against SDPA and the definition, and no wait of the host for the device."""

import pytest
import torch
from attention_definition import SEGMENTS, Caller, dense_definition, tensors
from tiny import TARGETS, alive, assert_close, pretraining_config, relative_error, view_inputs

from spa3r import Spa3RForPreTraining
from spa3r.models.attention import Segments, packed_attention, why_unusable

pytestmark = pytest.mark.gpu

BACK_ENDS = [
    pytest.param(name, marks=pytest.mark.skipif(why_unusable(name) is not None, reason=f"no {name} here"))
    for name in ("eager", "sdpa", "xformers", "flash_attention_2")
]
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Relative error of outputs and gradients against float64, TF32 off."""

CASES = SEGMENTS | {
    "plain, long": Segments.within([1024, 1024]),
    "ragged, long": Segments.within([1374, 37, 700, 1374, 1]),
    "asymmetric, long": Segments((600, 424, 300, 100), ((0, 600), (0, 1024), (1024, 300), (1024, 400))),
}


@pytest.fixture(autouse=True)
def exact_float32():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("segments", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("head_dim", (16, 48, 64, 128))
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_every_back_end_is_the_dense_definition_forward_and_backward(back_end, dtype, head_dim, segments):
    if back_end == "flash_attention_2" and dtype == torch.float32:
        pytest.skip("half precision only")
    inputs = tensors(segments, heads=3, head_dim=head_dim, dtype=dtype, device="cuda")
    output = packed_attention(Caller(back_end), *inputs, segments)
    wanted = dense_definition(*inputs, segments)
    assert output.dtype == dtype and relative_error(output, wanted) <= TOLERANCES[dtype]
    cotangent = torch.randn_like(output)
    ours = torch.autograd.grad(output, inputs, cotangent)
    for gradient, reference in zip(ours, torch.autograd.grad(wanted, inputs, cotangent.double())):
        assert relative_error(gradient, reference) <= 2 * TOLERANCES[dtype]


@pytest.mark.parametrize("segments", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_the_host_never_waits(back_end, segments):
    """After one warm-up call, in which masks and offsets are made."""
    inputs = tensors(segments, dtype=torch.bfloat16, device="cuda")
    caller = Caller(back_end)
    packed_attention(caller, *inputs, segments).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed_attention(caller, *inputs, segments).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def pretraining(back_end: str, device: str = "cuda"):
    """A pretraining step; its head width, 32, is one that every kernel takes."""
    model = alive(Spa3RForPreTraining(pretraining_config(hidden_size=64, num_attention_heads=2))).to(device)
    model.set_attn_implementation(back_end)
    inputs = view_inputs(targets=TARGETS)
    inputs["view_pixel_values"] = inputs["view_pixel_values"].to(device)
    return model, inputs


@pytest.mark.parametrize("back_end", BACK_ENDS[:3])
def test_pretraining_on_the_device_is_pretraining_on_the_cpu(back_end):
    results = []
    for device in ("cpu", "cuda"):
        model, inputs = pretraining("sdpa" if device == "cpu" else back_end, device)
        out = model(**inputs)
        out.loss.backward()
        gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        results.append(gradients | {"loss": out.loss.cpu(), "latents": out.latents.cpu()})
    assert_close(results[1], results[0], 1e-3)


@pytest.mark.parametrize("back_end", BACK_ENDS[:3])
def test_a_pretraining_step_never_waits(back_end):
    model, inputs = pretraining(back_end)
    model(**inputs).loss.backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**inputs).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def bfloat16_step(device: str, back_end: str, half: bool) -> tuple[float, torch.Tensor]:
    """Loss and gradient of a step as `spa3r pretrain` takes it: frozen parts in bfloat16, the rest under autocast."""
    torch.manual_seed(0)
    model, inputs = pretraining(back_end, device)
    if half:
        for frozen in model.frozen_modules().values():
            frozen.to(torch.bfloat16)
    with torch.autocast(device, torch.bfloat16, enabled=half):
        loss = model.train()(**inputs).loss
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {p.grad.dtype for p in trained} == {torch.float32}
    return loss.item(), torch.cat([p.grad.flatten() for p in trained])


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_a_bfloat16_pretraining_step_is_finite_and_close_to_float32(back_end):
    (exact, reference), (loss, gradient) = (bfloat16_step("cuda", back_end, half) for half in (False, True))
    assert gradient.isfinite().all()
    assert loss == pytest.approx(exact, rel=2e-2)
    assert torch.nn.functional.cosine_similarity(gradient, reference, dim=0) >= 0.98


def test_gradient_checkpointing_takes_less_memory_and_changes_nothing():
    peaks, gradients = [], []
    for checkpointing in (False, True):
        model, _ = pretraining("sdpa")
        inputs = view_inputs([[(16, 16)] * 8] * 4, [[0, 1] * 4] * 4)
        inputs["view_pixel_values"] = inputs["view_pixel_values"].cuda()
        if checkpointing:
            model.train().gradient_checkpointing_enable()
        loss = model.train()(**inputs).loss
        peaks.append(torch.cuda.memory_allocated())
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        del model, loss
    assert relative_error(gradients[1], gradients[0]) <= 1e-4
    assert peaks[1] < 0.8 * peaks[0]
