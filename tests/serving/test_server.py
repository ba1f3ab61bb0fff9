"""A started server with its clients: OpenAI's package, and plain HTTP."""

import base64
import io
import json
import threading
import time
from functools import cache

import httpx
import openai
import PIL.Image
import pytest
from media import counting_video, data_url, encoded, noise
from tiny_spa3_vlm import PICTURES

from spa3r.console import Evicted, Limits
from spa3r.media.videos import sample_frames
from spa3r.rooms import camera_walk, generate_room, render

QUESTIONS = ["How many chairs are there?", "Is there a bed?", "What do you see?", "How far is the table from the lamp?"]


@cache
def room_photos(seed: int, count: int = 4) -> list[PIL.Image.Image]:
    room = generate_room(seed, level=0)
    return [PIL.Image.fromarray(image) for image in render(room, camera_walk(room, 4 * count)[::4]).images]


@pytest.fixture(scope="module")
def photos():
    return room_photos(0)


def client_of(server, **kwargs) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, **kwargs)


def shown(photos) -> list[dict]:
    return [{"type": "image_url", "image_url": {"url": data_url(photo)}} for photo in photos]


def about(photos, question: str) -> list[dict]:
    return [{"role": "user", "content": [*shown(photos), {"type": "text", "text": question}]}]


def about_scene(scene: str, question: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "scene", "id": scene}, {"type": "text", "text": question}]}]


def upload(server, photos, path: str = "/v1/scenes", **data) -> httpx.Response:
    files = [("files", (f"{i}.png", encoded(photo), "image/png")) for i, photo in enumerate(photos)]
    return httpx.post(server.url + path, files=files, data=data, timeout=60)


def post(server, content, path: str = "/v1/chat/completions", **headers) -> httpx.Response:
    body = content if isinstance(content, str | bytes) else json.dumps(content)
    return httpx.post(
        server.url + path, content=body, headers={"content-type": "application/json"} | headers, timeout=60
    )


def error_of(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def metric(server, name: str) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


# OpenAI's client ------------------------------------------------------------------------------------------------------


def test_chat(server, photos):
    client = client_of(server)
    [model] = client.models.list().data
    assert (model.id, client.models.retrieve("embedded").id) == ("embedded", "embedded")
    for question in QUESTIONS:
        answer = client.chat.completions.create(model=model.id, messages=about(photos, question))
        scene = server.model.encode_scene(server.processor, photos)
        assert answer.choices[0].message.content == server.model.ask(scene, question)
        assert answer.choices[0].message.role == "assistant" and answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == len(scene)  # the same pictures are encoded once


def test_streams(server, photos):
    client = client_of(server)
    messages = about(photos, "What do you see?")
    whole = client.chat.completions.create(model="embedded", messages=messages)
    chunks = list(
        client.chat.completions.create(
            model="embedded", messages=messages, stream=True, stream_options={"include_usage": True}
        )
    )
    *parts, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in parts) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in parts] == [None] * (len(parts) - 1) + ["stop"]
    assert last.choices == [] and last.usage.completion_tokens == whole.usage.completion_tokens > 1
    assert len({chunk.id for chunk in chunks}) == 1 and {chunk.usage for chunk in parts} == {None}
    without = list(client.chat.completions.create(model="embedded", messages=messages, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in without)


def test_a_robots_loop(server, photos):
    client = client_of(server)

    def ask(scene: str, question: str) -> str:
        answer = client.chat.completions.create(model="embedded", messages=about_scene(scene, question))
        assert answer.usage.prompt_tokens_details.cached_tokens > 0
        return answer.choices[0].message.content

    def alone(pictures, question: str) -> str:
        return server.model.ask(server.model.encode_scene(server.processor, pictures), question)

    made = upload(server, photos[:2])
    assert made.status_code == 201
    scene = made.json()["id"]
    assert ask(scene, QUESTIONS[2]) == alone(photos[:2], QUESTIONS[2])
    grown = upload(server, photos[2:], f"/v1/scenes/{scene}/pictures").json()
    assert (grown["id"], grown["views"], made.json()["views"]) == (scene, 4, 2)
    assert [ask(scene, question) for question in QUESTIONS] == [alone(photos, question) for question in QUESTIONS]
    listed = httpx.get(f"{server.url}/v1/scenes").json()["data"]
    assert grown in listed and httpx.get(f"{server.url}/v1/scenes/{scene}").json() == grown
    assert httpx.delete(f"{server.url}/v1/scenes/{scene}").json()["deleted"] is True
    with pytest.raises(openai.NotFoundError, match=f"There is no scene '{scene}'. Upload it to /v1/scenes"):
        ask(scene, QUESTIONS[0])
    assert error_of(httpx.delete(f"{server.url}/v1/scenes/{scene}"), 404)["code"] == "scene_not_found"


def test_scenes_and_questions_with_a_system_prompt(server, photos):
    """A scene is encoded after the system prompt: another one encodes it again."""
    system = "Answer in one word."
    made = post(server, {"content": shown(photos), "system": system}, "/v1/scenes").json()
    scene = server.model.encode_scene(server.processor, photos, system=system)
    assert made["prompt_tokens"] == len(scene)
    for role, cached in (("system", True), ("developer", True), (None, False)):
        before = [] if role is None else [{"role": role, "content": system}]
        asked = {"model": "embedded", "messages": [*before, *about_scene(made["id"], QUESTIONS[2])]}
        answer = post(server, asked).json()
        wanted = scene if cached else server.model.encode_scene(server.processor, photos)
        assert answer["choices"][0]["message"]["content"] == server.model.ask(wanted, QUESTIONS[2])
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0 or not cached


def test_videos(server, tmp_path):
    video = counting_video(tmp_path / "walk.mp4", 12).read_bytes()
    frames = sample_frames(video, 5)
    files = {"files": ("walk.mp4", video, "video/mp4")}
    made = httpx.post(f"{server.url}/v1/scenes", files=files, data={"num_frames": "5"}, timeout=60).json()
    assert made["views"] == 5
    wanted = server.model.ask(server.model.encode_scene(server.processor, frames), QUESTIONS[2])
    url = "data:video/mp4;base64," + base64.b64encode(video).decode()
    part = {"type": "video_url", "video_url": {"url": url, "num_frames": 5}}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": QUESTIONS[2]}]}]
    for asked in (messages, about_scene(made["id"], QUESTIONS[2])):
        answer = post(server, {"model": "embedded", "messages": asked}).json()
        assert answer["choices"][0]["message"]["content"] == wanted


def test_conversations_and_pictures_anywhere(server, photos):
    """A conversation about a scene, and pictures that don't stand first, have the answer of the whole prompt."""
    messages = about(photos, QUESTIONS[0])
    messages += [{"role": "assistant", "content": "Three."}, {"role": "user", "content": QUESTIONS[2]}]
    later = [{"role": "user", "content": "Look at this."}, {"role": "assistant", "content": "At what?"}, messages[0]]
    for asked in (messages, later, [{"role": "user", "content": QUESTIONS[2]}]):
        chat = [
            {"role": m["role"], "content": [{"type": "text", "text": m["content"]}]}
            if isinstance(m["content"], str)
            else {
                "role": m["role"],
                "content": [*({"type": "image", "image": photo} for photo in photos), m["content"][-1]],
            }
            for m in asked
        ]
        inputs = server.processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True)
        tokens = server.model.generate(**inputs, max_new_tokens=128, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answer = post(server, {"model": "embedded", "messages": asked}).json()
        wanted = server.processor.decode(tokens, skip_special_tokens=True).strip()
        assert answer["choices"][0]["message"]["content"] == wanted
        assert answer["usage"]["prompt_tokens"] == inputs["input_ids"].shape[1]


def test_how_answers_are_generated(talkative):
    """On a model that never ends: length, stop texts, draws, several answers."""
    client = client_of(talkative)

    def ask(**arguments) -> list:
        messages = about(PICTURES, "What?")
        return client.chat.completions.create(model="tiny", messages=messages, **arguments).choices

    [short] = ask(max_tokens=12)
    wanted = talkative.model.ask(
        talkative.model.encode_scene(talkative.processor, PICTURES), "What?", max_new_tokens=12
    )
    assert (short.message.content, short.finish_reason) == (wanted, "length")
    assert ask(max_completion_tokens=12)[0].message.content == wanted
    stop = wanted[5:7]
    [stopped] = ask(max_tokens=200, stop=stop)
    assert (stopped.message.content, stopped.finish_reason) == (wanted[: wanted.index(stop)].rstrip(), "stop")
    drawn = ask(max_tokens=12, temperature=1.5, seed=3, n=3)
    assert len({choice.message.content for choice in drawn}) == 3 and [c.index for c in drawn] == [0, 1, 2]
    [again] = ask(max_tokens=12, temperature=1.5, seed=5)
    assert again.message.content == drawn[2].message.content  # each answer has the next seed
    texts = ["", ""]
    for chunk in ask_stream(client, n=2, temperature=1.5, seed=4, max_tokens=12):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [drawn[1].message.content, drawn[2].message.content]


def ask_stream(client, **arguments):
    return client.chat.completions.create(model="tiny", messages=about(PICTURES, "What?"), stream=True, **arguments)


def test_encoding_doesnt_hold_running_answers_up(talkative):
    """Pieces of an answer come while a scene is being encoded."""
    client = client_of(talkative)
    stream = iter(ask_stream(client, max_tokens=3000))
    for _ in range(5):
        next(stream)
    encode, (began, go_on) = talkative.engine._answering.encode, (threading.Event(), threading.Event())

    def slow(*arguments):
        began.set()
        assert go_on.wait(30)
        return encode(*arguments)

    talkative.engine._answering.encode = slow
    made = []
    thread = threading.Thread(target=lambda: made.append(upload(talkative, [noise(56, 56, 77)])))
    try:
        thread.start()
        assert began.wait(30)
        for _ in range(20):
            next(stream)
        go_on.set()
        thread.join(30)
        assert made[0].status_code == 201
    finally:
        go_on.set()
        talkative.engine._answering.encode = encode
        stream.close() if hasattr(stream, "close") else None
        thread.join(30)


# Wrong requests -------------------------------------------------------------------------------------------------------


def chat(content, **more) -> dict:
    return {"model": "embedded", "messages": [{"role": "user", "content": content}]} | more


def picture(url: str) -> list[dict]:
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]


TEXT = {"type": "text", "text": "What?"}
WRONG = {
    "broken JSON": ("{", 400, "invalid_json", "The body must be JSON, and it isn't: Expecting property name"),
    "no object": ([], 400, "invalid_json", "must be a JSON object, got a list"),
    "deep JSON": ("[" * 100_000, 400, "invalid_json", "it is nested too deeply"),
    "no messages": ({"model": "embedded"}, 400, "missing_parameter", "`messages` is missing"),
    "another model": (
        chat("Hi.") | {"model": "x"},
        404,
        "model_not_found",
        "There is no model 'x' here, but 'embedded'",
    ),
    "no user": (
        {"model": "embedded", "messages": [{"role": "system", "content": "Hi."}]},
        *(400, "invalid_value", "The last message must have the role 'user', got 'system'"),
    ),
    "a tool's message": (
        {"model": "embedded", "messages": [{"role": "tool", "content": "Hi."}]},
        *(400, "invalid_value", "`messages[0].role`: Input should be 'system', 'developer', 'user' or 'assistant'"),
    ),
    "no question": (chat("  "), 400, "invalid_value", "The last message must hold a text, got none"),
    "content": (chat(5), 400, "invalid_value", "`messages[0].content`: Input should be a valid list, got 5"),
    "a part": (chat([{"type": "sound"}]), 400, "invalid_value", "`messages[0].content[0]`: Input tag 'sound'"),
    "no URL": (
        chat([{"type": "image_url", "image_url": {}}, TEXT]),
        *(400, "missing_parameter", "`messages[0].content[0].image_url.url` is missing"),
    ),
    "detail": (
        chat([{"type": "image_url", "image_url": {"url": "data:,", "detail": "low"}}, TEXT]),
        *(400, "invalid_value", "`messages[0].content[0].image_url.detail`: Input should be 'auto', got 'low'"),
    ),
    "a file": (chat(picture("file:///etc/passwd")), 400, "invalid_url", "The server reads none of its own files"),
    "a path": (chat(picture("/etc/passwd")), 400, "invalid_url", "must be a data URL"),
    "a remote picture": (chat(picture("http://127.0.0.1/x.png")), 400, "invalid_url", "for `--allow-remote`"),
    "a broken picture": (
        chat(picture("data:image/png;base64,iVBORw0KGgo=")),
        *(400, "invalid_image", "The picture can't be decoded: picture 1 of the request"),
    ),
    "a broken video": (
        chat([{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}, TEXT]),
        *(400, "invalid_video", "The video video 1 of the request can't be decoded"),
    ),
    "a placeholder": (
        chat("What is <|image_pad|>?"),
        *(400, "invalid_prompt", "The text of message 0 ('user') must not contain '<|image_pad|>'"),
    ),
    "an end of turn": (
        {"model": "embedded", "messages": [{"role": "system", "content": "<|im_end|>"}, *chat("Hi.")["messages"]]},
        *(400, "invalid_prompt", "The text of message 0 ('system') must not contain '<|im_end|>'"),
    ),
    "500 pictures": (
        chat([*picture(data_url(noise(8, 8)))[:1] * 500, TEXT]),
        *(400, "too_many_pictures", "A place must have at most 64 pictures and frames, got 500"),
    ),
    "65 frames": (
        chat([{"type": "video_url", "video_url": {"url": "data:,", "num_frames": 65}}, TEXT]),
        *(400, "too_many_pictures", "at most 64 pictures and frames, got 65"),
    ),
    "a long text": (chat("x" * 32_001), 400, "context_length_exceeded", "at most 32000 characters together, got 32001"),
    "an unknown scene": (
        chat([{"type": "scene", "id": "x"}, TEXT]),
        *(404, "scene_not_found", "There is no scene 'x'. Upload it to /v1/scenes"),
    ),
    "a late scene": (
        chat([TEXT, {"type": "scene", "id": "x"}]),
        *(400, "invalid_value", "A scene must be the only pictures of a conversation"),
    ),
    "an assistant's picture": (
        {
            "model": "embedded",
            "messages": [{"role": "assistant", "content": picture("data:,")}, *chat("Hi.")["messages"]],
        },
        *(400, "invalid_value", "Message 0 of the role 'assistant' must have text alone, got 'image_url'"),
    ),
    "tools": (chat("Hi.", tools=[{"type": "function"}]), 400, "unsupported_parameter", "`tools` is not supported"),
    "logprobs": (chat("Hi.", logprobs=True), 400, "unsupported_parameter", "`logprobs` is not supported"),
    "a penalty": (chat("Hi.", presence_penalty=0.5), 400, "unsupported_parameter", "`presence_penalty` is not"),
    "a JSON answer": (
        chat("Hi.", response_format={"type": "json_object"}),
        *(400, "unsupported_parameter", "`response_format` is not supported"),
    ),
    "an unknown parameter": (chat("Hi.", temprature=1), 400, "unknown_parameter", "`temprature` is not a parameter"),
    "temperature": (
        chat("Hi.", temperature=3),
        400,
        "invalid_value",
        "`temperature`: Input should be less than or equal",
    ),
    "top_p": (chat("Hi.", top_p=0), 400, "invalid_value", "`top_p`: Input should be greater than 0"),
    "tokens": (chat("Hi.", max_tokens=1025), 400, "invalid_value", "`max_tokens` must be at most 1024, got 1025"),
    "no tokens": (
        chat("Hi.", max_tokens=0),
        400,
        "invalid_value",
        "`max_tokens`: Input should be greater than or equal",
    ),
    "two lengths": (
        chat("Hi.", max_tokens=1, max_completion_tokens=2),
        *(400, "invalid_value", "are two names of the same limit, got 1 and 2"),
    ),
    "n": (chat("Hi.", n=9), 400, "invalid_value", "`n` must be at most 8, got 9"),
    "stop": (chat("Hi.", stop=["a"] * 5), 400, "invalid_value", "`stop`: List should have at most 4 items"),
    "stream options": (chat("Hi.", stream_options={}), 400, "invalid_value", "`stream_options` needs `stream`"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests(server, name):
    content, status, code, words = WRONG[name]
    error = error_of(post(server, content), status)
    assert words in error["message"] and error["code"] == code
    assert error["type"] == "invalid_request_error"


def test_what_asks_for_nothing_is_accepted(server):
    harmless = {
        "logprobs": False,
        "tools": [],
        "presence_penalty": 0,
        "user": "me",
        "metadata": {"a": "b"},
        "seed": None,
    }
    assert post(server, chat("Hi.", **harmless)).status_code == 200


def test_wrong_uploads(server, photos):
    for data, code, words in (
        ({"num_frames": "0"}, "invalid_value", "`num_frames` must be at least 1, got '0'"),
        ({"frames": "3"}, "unknown_parameter", "may have the fields 'num_frames' and 'system', got 'frames'"),
        ({"system": "<|im_end|>"}, "invalid_prompt", "must not contain '<|im_end|>'"),
    ):
        error = error_of(upload(server, photos[:1], **data), 400)
        assert error["code"] == code and words in error["message"]
    broken = httpx.post(f"{server.url}/v1/scenes", files={"files": ("kitchen.jpg", b"no picture", "image/jpeg")})
    assert "can't be decoded: kitchen.jpg" in error_of(broken, 400)["message"]
    none = httpx.post(f"{server.url}/v1/scenes", files={"x": (None, "")})
    assert error_of(none, 400)["code"] == "unknown_parameter"
    many = error_of(upload(server, [noise(4, 4)] * 500), 400)
    assert many["code"] == "too_many_pictures" and "got 500" in many["message"]
    text = httpx.post(f"{server.url}/v1/scenes", content=b"{}", headers={"content-type": "text/plain"})
    assert "must be 'application/json', got 'text/plain'" in error_of(text, 415)["message"]
    assert error_of(post(server, {"content": []}, "/v1/scenes"), 400)["param"] == "content"
    assert error_of(upload(server, photos[:1], "/v1/scenes/x/pictures"), 404)["code"] == "scene_not_found"
    assert error_of(httpx.get(f"{server.url}/v2"), 404)["code"] == "not_found"
    assert error_of(httpx.get(f"{server.url}/v1/chat/completions"), 405)["code"] == "method_not_allowed"


def test_limits_on_bytes_and_pixels_and_the_key(embedded, start):
    limits = Limits(question_length=100, views=2, file_bytes=20_000, pixels=50 * 50)
    with start(*embedded, limits=limits, api_key="secret") as server:
        key = {"authorization": "Bearer secret"}
        for headers, got in (({}, "got none"), ({"authorization": "Bearer x"}, "got another key")):
            error = error_of(post(server, chat("Hi."), **headers), 401)
            assert got in error["message"] and error["code"] == "invalid_api_key"
        assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
        for path in ("/metrics", "/v1/models", "/v1/scenes"):
            assert httpx.get(server.url + path).status_code == 401
            assert httpx.get(server.url + path, headers=key).status_code == 200
        assert post(server, chat("Hi."), **key).status_code == 200
        large = "at most 20000 bytes, got"
        assert large in error_of(post(server, "x" * 20_001, **key), 413)["message"]
        chunks = (b" " * 5000 for _ in range(5))  # without a declared size
        body = httpx.post(
            f"{server.url}/v1/chat/completions", content=chunks, headers=key | {"content-type": "application/json"}
        )
        assert error_of(body, 413)["code"] == "request_too_large"
        error = error_of(post(server, chat(picture(data_url(noise(51, 50)))), **key), 400)
        assert "must have at most 2500 pixels, got" in error["message"] and error["code"] == "invalid_image"
        error = error_of(post(server, chat([*picture(data_url(noise(9, 9)))[:1] * 3, TEXT]), **key), 400)
        assert error["code"] == "too_many_pictures"


# Many requests --------------------------------------------------------------------------------------------------------


def check_clients(embedded, start, clients: int, questions: int, scenes: int) -> None:
    """All answers under load are those of asking alone."""
    model, processor = embedded
    rooms = [room_photos(seed, 3) for seed in range(scenes)]
    wanted = [model.ask(model.encode_scene(processor, photos), QUESTIONS[:questions]) for photos in rooms]
    with start(*embedded, max_running=16, max_waiting=2 * clients) as server:
        ids = [upload(server, photos).json()["id"] for photos in rooms[::2]]
        got: dict[tuple[int, int], str] = {}

        def ask_all(number: int) -> None:
            room = number % scenes
            client = client_of(server, timeout=120)
            for index in range(questions):
                question = QUESTIONS[(index + number) % questions]
                uploaded = room % 2 == 0
                messages = about_scene(ids[room // 2], question) if uploaded else about(rooms[room], question)
                if number % 3:
                    answer = client.chat.completions.create(model="embedded", messages=messages)
                    text = answer.choices[0].message.content
                else:
                    chunks = client.chat.completions.create(model="embedded", messages=messages, stream=True)
                    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
                got[number, index] = text

        threads = [threading.Thread(target=ask_all, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == clients * questions
        for (number, index), text in got.items():
            assert text == wanted[number % scenes][(index + number) % questions], (number, index)
        steps, answers = metric(server, "spa3r_step_answers_count"), metric(server, "spa3r_step_answers_sum")
        assert answers / steps > 1.5  # answers were generated together
        assert metric(server, "spa3r_in_flight") == metric(server, "spa3r_running") == 0


def test_answers_of_many_clients(embedded, start):
    check_clients(embedded, start, clients=8, questions=2, scenes=3)


@pytest.mark.slow
def test_answers_of_50_clients_over_10_scenes(embedded, start):
    check_clients(embedded, start, clients=50, questions=4, scenes=10)


def open_stream(server, tokens: int = 3000) -> tuple[httpx.Response, httpx.Client]:
    """A response that is streamed, and the client whose `close` ends the connection."""
    client = httpx.Client(timeout=60)
    body = {"model": "tiny", "messages": about(PICTURES, "What?"), "max_tokens": tokens, "stream": True}
    request = client.build_request("POST", f"{server.url}/v1/chat/completions", json=body)
    return client.send(request, stream=True), client


def wait_until(condition, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not (done := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return bool(done)


def test_too_many_requests_are_refused_and_counted(start, talkative):
    with start(
        talkative.model, talkative.processor, "tiny", max_running=1, max_waiting=1, max_tokens=3000, grace=0.0
    ) as server:
        streams = [open_stream(server) for _ in range(2)]
        assert wait_until(lambda: metric(server, "spa3r_running") == metric(server, "spa3r_waiting") == 1)
        for _ in range(3):
            refused = post(server, chat("Hi.") | {"model": "tiny"})
            error = error_of(refused, 429)
            assert int(refused.headers["retry-after"]) >= 1 and error["type"] == "rate_limit_error"
            assert (
                "at most 2 answers at a time (1 are generated, the others wait), and 2 are under way"
                in error["message"]
            )
        assert metric(server, "spa3r_requests_refused_total") == 3
        for _, client in streams:
            client.close()
        assert wait_until(lambda: metric(server, "spa3r_in_flight") == 0)
        body = chat("Hi.", max_tokens=2, n=2) | {"model": "tiny"}
        assert post(server, body).status_code == 200
        assert error_of(post(server, body | {"n": 3}), 429)["code"] == "too_many_requests"


def test_clients_that_go_away_free_their_work(talkative):
    threads = threading.active_count()
    for how in range(3):
        response, client = open_stream(talkative)
        lines = response.iter_lines()
        for _ in range(how * 4 + 1):
            next(lines)
        client.close()
    whole = httpx.Client(timeout=httpx.Timeout(60, read=0.5))
    with pytest.raises(httpx.ReadTimeout):
        body = {"model": "tiny", "messages": about(PICTURES, "What?"), "max_tokens": 3000}
        whole.post(f"{talkative.url}/v1/chat/completions", json=body)
    whole.close()
    assert wait_until(lambda: metric(talkative, "spa3r_in_flight") == 0)
    assert wait_until(lambda: talkative.engine.load() == (0, 0))
    assert not talkative.engine._batch.answers and threading.active_count() <= threads + 8


def test_requests_take_at_most_their_time(start, talkative):
    with start(talkative.model, talkative.processor, "tiny", timeout=0.6, grace=0.0, max_tokens=3000) as server:
        body = {"model": "tiny", "messages": about(PICTURES, "What?"), "max_tokens": 3000}
        error = error_of(post(server, body), 504)
        assert error["code"] == "timeout" and error["type"] == "server_error"
        *_, last, _ = post(server, body | {"stream": True}).text.split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        assert wait_until(lambda: server.engine.load() == (0, 0))


@pytest.mark.parametrize("grace", (0.2, 60.0))
def test_running_requests_have_the_time_of_grace(start, talkative, grace):
    """One that takes longer gets an error, one that takes less its answer; new ones are refused."""
    tokens = 3000 if grace < 1 else 60
    with start(talkative.model, talkative.processor, "tiny", max_tokens=3000, grace=grace) as server:
        response, client = open_stream(server, tokens)
        lines = response.iter_lines()
        next(lines)
        server.stop()
        *_, last = [line for line in lines if line]
        if grace < 1:
            error = json.loads(last.removeprefix("data: "))["error"]
            assert error["code"] == "shutting_down" and "Ask again when it is back" in error["message"]
        else:
            assert last == "data: [DONE]"
        client.close()
        server.thread.join(30)
        assert not server.thread.is_alive()
        with pytest.raises(httpx.ConnectError):
            post(server, chat("Hi."))


def test_a_failing_step_fails_its_answers_alone(talkative, capfd):
    """The server goes on, and doesn't show its insides."""
    step = talkative.engine._batch.step

    def broken():
        talkative.engine._batch.step = step
        raise RuntimeError("out of memory at /secret/path")

    talkative.engine._batch.step = broken
    body = {"model": "tiny", "messages": about(PICTURES, "What?"), "max_tokens": 5}
    error = error_of(post(talkative, body), 500)
    assert error["code"] == "internal_error" and "secret" not in error["message"]
    assert post(talkative, body).status_code == 200


# Memory for scenes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("evicted", Evicted)
def test_scenes_that_leave_the_memory(embedded, start, evicted):
    model, processor = embedded
    rooms = [room_photos(seed, 2) for seed in range(3)]
    size = model.encode_scene(processor, rooms[0]).num_bytes
    with start(*embedded, cache_bytes=int(2.5 * size), evicted=evicted) as server:
        ids = [upload(server, photos).json()["id"] for photos in rooms]
        states = {scene["id"]: scene["in_memory"] for scene in httpx.get(f"{server.url}/v1/scenes").json()["data"]}
        assert metric(server, "spa3r_encoded_scenes") == 2
        answer = post(server, {"model": "embedded", "messages": about_scene(ids[0], QUESTIONS[2])})
        if evicted == Evicted.ENCODE:
            assert states == {ids[0]: False, ids[1]: True, ids[2]: True}
            wanted = model.ask(model.encode_scene(processor, rooms[0]), QUESTIONS[2])
            assert answer.json()["choices"][0]["message"]["content"] == wanted
            assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        else:
            assert states == {ids[1]: True, ids[2]: True}
            error = error_of(answer, 410)
            assert error["code"] == "scene_evicted" and "Upload its pictures again" in error["message"]
            error = error_of(upload(server, rooms[0], f"/v1/scenes/{ids[1]}/pictures"), 409)
            assert error["code"] == "pictures_not_kept"
            system = [{"role": "system", "content": "Be brief."}]
            body = {"model": "embedded", "messages": [*system, *about_scene(ids[1], QUESTIONS[2])]}
            assert error_of(post(server, body), 400)["code"] == "other_system_prompt"


def test_pictures_have_a_limit_too(embedded, start):
    rooms = [room_photos(seed, 2) for seed in range(3)]
    size = 2 * 3 * 112 * 112
    with start(*embedded, picture_bytes=2 * size) as server:
        ids = [upload(server, photos).json()["id"] for photos in rooms]
        answer = post(server, {"model": "embedded", "messages": about_scene(ids[0], QUESTIONS[2])})
        assert error_of(answer, 410)["code"] == "scene_evicted"
        assert post(server, {"model": "embedded", "messages": about_scene(ids[1], QUESTIONS[2])}).status_code == 200
        error = error_of(upload(server, room_photos(0, 5)), 413)
        assert error["code"] == "scene_too_large" and f"at most {2 * size} bytes" in error["message"]


def test_pictures_of_one_scene_are_encoded_once_for_all_that_wait(embedded, start):
    photos = room_photos(5, 3)
    with start(*embedded) as server:
        encodings, encode = [], server.engine._answering.encode
        server.engine._answering.encode = lambda *arguments: (encodings.append(1), time.sleep(0.3), encode(*arguments))[
            2
        ]
        bodies = [{"model": "embedded", "messages": about(photos, question)} for question in QUESTIONS]
        answers: list = [None] * len(bodies)

        def ask(index: int) -> None:
            answers[index] = post(server, bodies[index]).json()["choices"][0]["message"]["content"]

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(bodies))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        scene = server.model.encode_scene(server.processor, photos)
        assert answers == server.model.ask(scene, QUESTIONS) and len(encodings) == 1


def test_pictures_are_read_as_the_library_reads_them(server):
    """A photo that is stored on its side, in a format with transparency."""
    photo = noise(80, 60, 3, channels=4)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    photo.save(file, "PNG", exif=exif)
    answer = post(
        server,
        {
            "model": "embedded",
            "messages": [*chat(picture("data:;base64," + base64.b64encode(file.getvalue()).decode()))["messages"]],
        },
    )
    wanted = server.model.ask(server.model.encode_scene(server.processor, file.getvalue()), "What?")
    assert answer.json()["choices"][0]["message"]["content"] == wanted
