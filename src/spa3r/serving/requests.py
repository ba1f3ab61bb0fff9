"""The requests that the server takes, in the form of OpenAI's API. What has no effect is refused. Imports no torch."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    Tag,
    ValidationError,
)

from spa3r.serving.errors import ApiError

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
"""Parameters of OpenAI's API that this server doesn't support, with the values that ask for nothing; so does null."""

WITHOUT_EFFECT = {"metadata", "prompt_cache_key", "safety_identifier", "user"}
"""Parameters that name the client or the request, and don't affect an answer."""


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Url(_Form):
    """Where a picture or video is."""

    url: StrictStr
    detail: Literal["auto"] | None = None


class VideoUrl(_Form):
    """Where a video is, and how many of its frames are taken; null: by its length."""

    url: StrictStr
    num_frames: Annotated[StrictInt, Field(ge=1)] | None = None


class TextPart(_Form):
    type: Literal["text"]
    text: StrictStr


class ImagePart(_Form):
    type: Literal["image_url"]
    image_url: Url


class VideoPart(_Form):
    type: Literal["video_url"]
    video_url: VideoUrl


class ScenePart(_Form):
    """A scene that was uploaded before."""

    type: Literal["scene"]
    id: StrictStr


MediaPart = Annotated[ImagePart | VideoPart, Field(discriminator="type")]
Part = Annotated[TextPart | ImagePart | VideoPart | ScenePart, Field(discriminator="type")]


class Message(_Form):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[StrictStr, Tag("text")] | Annotated[list[Part], Field(min_length=1), Tag("parts")],
        Discriminator(lambda content: "text" if isinstance(content, str) else "parts"),
    ]
    name: None = None
    refusal: None = None
    audio: None = None
    tool_calls: None = None
    function_call: None = None
    annotations: list[Any] | None = None


class StreamOptions(_Form):
    include_usage: StrictBool = False
    include_obfuscation: Literal[False] | None = None


class ChatRequest(_Form):
    """A request to ``/v1/chat/completions``. Without `temperature`, answers are greedy."""

    model: StrictStr
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Annotated[StrictFloat, Field(ge=0, le=2)] | None = None
    top_p: Annotated[StrictFloat, Field(gt=0, le=1)] | None = None
    n: Annotated[StrictInt, Field(ge=1)] | None = None
    seed: Annotated[StrictInt, Field(ge=0, lt=2**63)] | None = None
    stop: Annotated[
        Annotated[list[Annotated[StrictStr, Field(min_length=1)]], Field(max_length=4)] | None,
        BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop),
    ] = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None


class SceneRequest(_Form):
    """A request to ``/v1/scenes``, or for more pictures of a scene, as JSON."""

    content: Annotated[list[MediaPart], Field(min_length=1)]
    system: StrictStr | None = None


RequestForm = TypeVar("RequestForm", bound=_Form)


def parsed(form: type[RequestForm], body: bytes) -> RequestForm:
    """A request from its body.

    Raises:
        ApiError: The body is not JSON, lacks something, or asks for what isn't supported.
    """
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        text = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(
            400, f"The body must be JSON, and it isn't: {text}. Correct the request.", "invalid_json"
        ) from None
    if not isinstance(values, dict):
        raise ApiError(400, f"The body must be a JSON object, got a {type(values).__name__}.", "invalid_json")
    if form is ChatRequest:
        values = {key: value for key, value in values.items() if key not in WITHOUT_EFFECT}
        for name in [name for name in values if name in NEUTRAL]:
            value = values.pop(name)
            if value is not None and value not in NEUTRAL[name]:
                raise ApiError(
                    400, f"`{name}` is not supported by this server. Leave it out.", "unsupported_parameter", name
                )
    try:
        return form.model_validate(values)
    except ValidationError as error:
        raise _invalid(error, values) from None


def _invalid(error: ValidationError, values: Any) -> ApiError:
    """The first fault, with its place in the request; pydantic's places also have names of alternatives."""
    first = error.errors(include_url=False)[0]
    place, got = "", first["input"]
    for index, part in enumerate(first["loc"]):
        is_missing = first["type"] == "missing" and index == len(first["loc"]) - 1
        if isinstance(part, int) and isinstance(values, list):
            place, values = f"{place}[{part}]", values[part]
        elif isinstance(values, dict) and (part in values or is_missing):
            place, values = f"{place}.{part}" if place else str(part), values.get(part)
    name = place.partition("[")[0].partition(".")[0] or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"`{place}` is not a parameter of this server. Leave it out.", "unknown_parameter", name)
    if first["type"] == "missing":
        return ApiError(400, f"`{place}` is missing. Add it to the request.", "missing_parameter", name)
    shown = f", got {got!r}" if isinstance(got, int | float | bool | None) else ""
    if isinstance(got, str):
        shown = f", got {got[:40]!r}{'...' * (len(got) > 40)}"
    return ApiError(400, f"`{place}`: {first['msg']}{shown}. Correct it.", "invalid_value", name)
