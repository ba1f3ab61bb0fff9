"""Engines of vLLM answer as the model does, token by token. They need vLLM, in an environment of its own."""

import asyncio
import base64
import gc
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from media import noise, user
from serving.vllm_models import SERVED, compose, pictures

from spa3r.models.spa3_vlm.asking import conversation
from spa3r.serving import export_vlm, vllm_messages, vllm_prompt
from spa3r.serving.answers import merged
from spa3r.serving.engine import EngineClosed, Prompt, Sampling
from spa3r.serving.vllm import GRID_FAMILIES
from spa3r.serving.vllm_engine import LocalVllm, RemoteVllm, VllmEngine

vllm = pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

WORDS = 6
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process, which saves its start
    "VLLM_NO_USAGE_STATS": "1",
}
QUESTIONS = [
    "How many chairs are in the room?",
    "What?",
    "Which object is closer to the door, the lamp or the sofa?",
    "How many lamps are in the room?",
]


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def engine(tmp_path):
    """A function that exports a model and starts an engine on it."""
    from vllm.distributed import cleanup_dist_env_and_memory

    started = []

    def start(composed):
        export_vlm(composed.model, composed.processor, tmp_path)
        options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024}
        started.append(vllm.LLM(str(tmp_path), enable_mm_embeds=True, limit_mm_per_prompt={"image": 4}, **options))
        return started[-1]

    yield start
    started.clear()
    gc.collect()
    cleanup_dist_env_and_memory()


def scenes(family: str) -> list[list]:
    """Different scenes, of different numbers of pictures where the family's engine allows it."""
    if family not in GRID_FAMILIES:
        return [pictures(family), list(reversed(pictures(family)))]
    sizes = [(60, 40), (33, 90), (28, 28), (120, 50)]
    return [
        [noise(*size, 10 * scene + i) for i, size in enumerate(sizes[:count])]
        for scene, count in enumerate((1, 4, 2, 3))
    ]


def wanted(composed, asked) -> tuple[list[int], list[float]]:
    """Tokens that the model generates, and their log probabilities."""
    inputs = composed.processor.apply_chat_template(
        [asked], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    choice = {"max_new_tokens": WORDS, "min_new_tokens": WORDS, "do_sample": False}
    output = composed.model.generate(**inputs, **choice, return_dict_in_generate=True, output_logits=True)
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    logits = [step[0].log_softmax(-1) for step in output.logits]
    return tokens, [step[token].item() for step, token in zip(logits, tokens)]


@pytest.mark.parametrize("family", SERVED)
def test_engine_gives_the_tokens_of_generate(family, engine):
    """1, 4 and 16 requests at once about different scenes; of most families 4."""
    composed = compose(family)
    is_main = family in ("qwen2_5_vl", "qwen3_vl")
    asked = [conversation(scene, question) for question in QUESTIONS[: 4 if is_main else 2] for scene in scenes(family)]
    want = [wanted(composed, one) for one in asked]
    prompts = [vllm_prompt(composed.model, composed.processor, one) for one in asked]
    running = engine(composed)
    options = {"temperature": 0, "max_tokens": WORDS, "min_tokens": WORDS, "ignore_eos": True, "logprobs": 1}
    for at_once in (1, 4, 16) if is_main else (4,):
        some = prompts[-at_once:]  # also those that the engine has in its cache
        outputs = running.generate(some, vllm.SamplingParams(**options), use_tqdm=False)
        for output, (tokens, probabilities) in zip(outputs, want[-at_once:], strict=True):
            chosen = output.outputs[0]
            assert list(chosen.token_ids) == tokens
            got = [step[token].logprob for step, token in zip(chosen.logprobs, tokens)]
            assert got == pytest.approx(probabilities, abs=2e-4)


def test_server_reuses_a_scene_by_uuid(tmp_path):
    """The OpenAI-compatible server, with deepstack features."""
    composed = compose("qwen3_vl")
    export_vlm(composed.model, composed.processor, tmp_path)
    asked = [conversation(pictures("qwen3_vl"), question) for question in QUESTIONS]
    want = [wanted(composed, one)[0] for one in asked]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path)]
    command += ["--served-model-name", "vlm", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += [
        "--enforce-eager",
        "--max-model-len",
        "1024",
        "--enable-mm-embeds",
        "--limit-mm-per-prompt",
        '{"image": 4}',
    ]
    command += ["--enable-prompt-tokens-details", "--block-size", "32"]
    log = (tmp_path / "server.log").open("w")
    server = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", server)
        options, cached = {"ignore_eos": True, "return_token_ids": True}, []
        for one, expected in zip(asked, want):
            messages = vllm_messages(composed.model, composed.processor, one)
            body = {"model": "vlm", "messages": messages, "temperature": 0, "max_tokens": WORDS, "min_tokens": WORDS}
            answer = _post(f"http://127.0.0.1:{port}/v1/chat/completions", body | options)
            assert answer["choices"][0]["token_ids"] == expected
            cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert cached[0] == 0
        assert min(cached[1:]) >= 32  # the scene's keys and values were found again by its digests
        _connections_are_kept(composed, f"http://127.0.0.1:{port}")
        _ask_through_spa3r_serve(composed, f"http://127.0.0.1:{port}", tmp_path / "model")
    finally:
        server.terminate()
        server.wait(60)
        log.close()


def _ask_through_spa3r_serve(composed, engine: str, folder) -> None:
    """`spa3r serve --engine URL`: 8 questions at once, about an uploaded scene and about pictures in the request."""
    composed.model.save_pretrained(folder)
    composed.processor.save_pretrained(folder)
    command = [sys.executable, "-m", "spa3r", "serve", "--model", str(folder), "--engine", engine, "--port", "0"]
    command.append("--json")
    server = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, text=True)
    try:
        url = json.loads(server.stdout.readline())["url"]
        photos = [_data_url(picture) for picture in pictures("qwen3_vl")]
        images = [{"type": "image_url", "image_url": {"url": photo}} for photo in photos]
        scene = _post(f"{url}/scenes", {"content": images})
        starts = [images, [{"type": "scene", "id": scene["id"]}]]
        asked = [(start, question) for start in starts for question in QUESTIONS]

        def answer(start, question) -> str:
            content = [*start, {"type": "text", "text": question}]
            body = {"model": "model", "messages": [{"role": "user", "content": content}], "max_tokens": WORDS}
            return _post(f"{url}/chat/completions", body)["choices"][0]["message"]["content"]

        with ThreadPoolExecutor(8) as clients:
            answers = list(clients.map(answer, *zip(*asked)))
        alone = composed.model.ask(composed.encode(pictures("qwen3_vl")), QUESTIONS, max_new_tokens=WORDS)
        assert answers == [*alone, *alone]
    finally:
        server.terminate()
        server.wait(60)


def _connections_are_kept(composed, url: str) -> None:
    """Answers read as the server reads them leave no connection in use."""

    async def work() -> list:
        remote = RemoteVllm(url)
        engine = VllmEngine(composed.model, composed.processor, remote)
        scene = await engine.encode(pictures("qwen3_vl"), None)
        for _ in range(5):
            answers = await engine.generate(Prompt(user(QUESTIONS[0]), scene), [Sampling(WORDS)] * 4)
            reasons = [piece.finish_reason async for _, piece in merged(answers)]
            assert len(reasons) - reasons.count(None) == 4
        await asyncio.sleep(0.1)
        connections = remote._client._transport._pool.connections
        states = [connection.is_idle() for connection in connections]
        await engine.close()
        return states

    states = asyncio.run(work())
    assert all(states) and len(states) <= 4


def _data_url(picture) -> str:
    file = io.BytesIO()
    picture.save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def test_serve_with_vllm_in_this_process(monkeypatch):
    """Scenes are encoded once; 12 answers at once, some cancelled; closing ends what runs."""
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")
    composed = compose("qwen2_5_vl")
    some = scenes("qwen2_5_vl")
    want = {
        (index, question): wanted(composed, conversation(scene, question))[0]
        for index, scene in enumerate(some)
        for question in QUESTIONS[:3]
    }
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024}
    local = LocalVllm(composed.model, composed.processor, 4, **options)
    engine = VllmEngine(composed.model, composed.processor, local)

    async def ask(index: int, question: str, scene, tokens: int = WORDS) -> tuple[str, int, str | None]:
        [answer] = await engine.generate(Prompt(user(question), scene), [Sampling(tokens)])
        pieces = [piece async for piece in answer]
        return "".join(piece.text for piece in pieces), pieces[-1].num_tokens, pieces[-1].finish_reason

    async def leave(scene) -> None:
        [answer] = await engine.generate(Prompt(user(QUESTIONS[0]), scene), [Sampling(900)])
        reading = asyncio.ensure_future(anext(aiter(answer)))
        await asyncio.sleep(0.05)
        answer.cancel()
        reading.cancel()

    async def work() -> None:
        encoded = [await engine.encode(scene, None) for scene in some]
        leaving = asyncio.gather(*(leave(scene) for scene in encoded))
        answers = await asyncio.gather(*(ask(*key, encoded[key[0]]) for key in want))
        await leaving
        for (text, count, reason), tokens in zip(answers, want.values(), strict=True):
            ends = composed.model.vlm.generation_config.eos_token_id
            assert ends not in tokens
            assert text == composed.processor.decode(tokens, skip_special_tokens=True).strip()
            assert (count, reason) == (WORDS, "length")
        assert engine.load() == (0, 0)
        running = asyncio.ensure_future(ask(0, QUESTIONS[0], encoded[0], 900))
        while engine.load() == (0, 0):
            await asyncio.sleep(0.01)
        await engine.close()
        with pytest.raises(EngineClosed):
            await running
        with pytest.raises(EngineClosed):
            await engine.encode(some[0], None)

    asyncio.run(work())
    assert not local._folder.exists()


def _wait_for(url: str, server: subprocess.Popen) -> None:
    for _ in range(600):
        assert server.poll() is None, "the server stopped"
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"{url} gave no answer")


def _post(url: str, body: dict) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise AssertionError(error.read().decode()) from error
