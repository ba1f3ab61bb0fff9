"""Messages with pictures and videos -> all inputs of a Spa3-VLM: the VLM's own inputs and packed views."""

from __future__ import annotations

import difflib
import inspect
import json
import os
import re
import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self, Unpack

import PIL.Image
from huggingface_hub import create_repo, snapshot_download
from transformers import AutoConfig, AutoProcessor, BatchFeature, ProcessorMixin
from transformers.processing_utils import ProcessingKwargs
from transformers.utils import TensorType

from spa3r.checkpoints import resolve
from spa3r.checks import check_count, is_count, shorten
from spa3r.media.images import Image, flattened, is_batch, to_rgb
from spa3r.media.videos import FrameChoice, check_frames
from spa3r.models.released import HUB_KWARGS, WHERE, ReleasedCheckpoint, find_adapter, find_released, view_size
from spa3r.models.spa3_vlm.messages import Conversations, check_conversations, is_batch_of_conversations, special_texts
from spa3r.models.spa3_vlm.videos import (
    CALL_OPTIONS,
    VIDEO_KEYS,
    call_options,
    check_call,
    frames_of,
    listed_videos,
    options_of_item,
    places_of,
)
from spa3r.models.spa3r.image_processing_spa3r import Spa3RImageProcessor, ViewBatch

VLM_FOLDER = "vlm_processor"
"""Subfolder of a saved processor for the VLM's own files."""

NOT_FOR_VLM = (*WHERE, "trust_remote_code", "_from_auto")
"""Keywords of ``from_pretrained`` about where files are; the VLM's processor is loaded from a local folder."""

CONFIG_FILE = "processor_config.json"

TOKEN_COUNTS = "image_tokens_per_scene"
SPATIAL_COUNTS = "spatial_tokens_per_scene"
VIEW_KEYS = ("view_pixel_values", "view_grid_hw", "views_per_scene", TOKEN_COUNTS, SPATIAL_COUNTS)
"""Keys that the processor adds to the VLM's own inputs."""

PICTURE_KEYS = ("image", "url", "path", "base64")
SIZE_KEYS = ("resized_height", "resized_width", "min_pixels", "max_pixels")
"""Size keys that a picture may have in other libraries' messages."""

TOKENIZING = threading.RLock()
"""A fast tokenizer stores the padding and truncation of its last call, so only one thread may use it at a time."""


class Spa3VLMProcessor(ProcessorMixin):
    """Any VLM's own processor, extended by packed views.

    All pictures of a conversation are views of one scene. A video is converted to some of its frames, which are passed
    to the VLM as pictures.

    Args:
        vlm_processor: The VLM's processor.
        view_image_processor: The image processor of the views.
        image_mode: The pictures passed to the VLM. ``"aligned"``: the processed views, cropped to whole VLM patches, as
            the released model was trained; the VLM's own processor doesn't rescale them if their size is within its
            limits. ``"native"``: the original pictures.
        num_frames: Number of frames of a video; None: clamp(round(seconds / 2), 4, 8).
        frames: How the frames of a video are chosen: ``"uniform"``, evenly spaced, or ``"coverage"``, those that differ
            most from each other (:class:`~spa3r.media.videos.FrameSampling`).
        image_token_id: Id of the VLM's image placeholder (its configuration's ``image_token_id``), used to count
            image tokens; None: the model counts them, which synchronizes with an accelerator.
        spatial_tokens: Number of places for tokens that the model appends to a scene (``integration="append"``): its
            ``config.spatial_tokens``, a number, or ``"patches"`` for one per patch of the views. They follow the
            conversation's last picture. None: the model appends no tokens.
        spatial_token: The token that marks these places; None: the tokenizer's padding token.

    Raises:
        ValueError: `image_mode` or `spatial_tokens` is unknown, or no token can mark the places.
    """

    def __init__(
        self,
        vlm_processor: ProcessorMixin,
        view_image_processor: Spa3RImageProcessor | None = None,
        image_mode: Literal["aligned", "native"] = "aligned",
        num_frames: int | None = None,
        image_token_id: int | None = None,
        spatial_tokens: int | Literal["patches"] | None = None,
        spatial_token: str | None = None,
        frames: FrameChoice = "uniform",
    ):
        if image_mode not in ("aligned", "native"):
            raise ValueError(f"`image_mode` must be 'aligned' or 'native', got {shorten(image_mode)}.")
        if num_frames is not None:
            check_count("num_frames", num_frames)
        check_frames(frames)
        if image_token_id is not None:
            check_count("image_token_id", image_token_id, lowest=0)
        if not isinstance(spatial_token, str | None):
            raise ValueError(f"`spatial_token` must be a token's text or None, got {shorten(spatial_token)}.")
        self.vlm_processor = vlm_processor
        self.view_image_processor = view_image_processor or Spa3RImageProcessor()
        self.image_mode = image_mode
        self.num_frames = num_frames
        self.frames: FrameChoice = frames
        self.image_token_id = image_token_id
        self._spatial_token = spatial_token
        self.spatial_tokens = spatial_tokens

    # Loading and saving

    @classmethod
    def from_vlm_and_spa3r(cls, vlm: str | Path, spa3r: str | Path | None = None, **kwargs: Any) -> Self:
        """The processor for ``Spa3VLMForConditionalGeneration.from_vlm_and_spa3r``.

        Args:
            vlm: Folder or hub id of the VLM.
            spa3r: Folder or hub id of the Spa3R, for its image processor; None: the released settings.
            **kwargs: Other arguments of the constructor; and ``token``, ``cache_dir``, ``local_files_only``,
                ``force_download`` for the hub.
        """
        hub = {key: kwargs.pop(key) for key in HUB_KWARGS if key in kwargs}
        return cls(
            AutoProcessor.from_pretrained(vlm, **hub),
            Spa3RImageProcessor.from_pretrained(spa3r, **hub) if spa3r is not None else None,
            image_token_id=AutoConfig.from_pretrained(vlm, **hub).image_token_id,
            **kwargs,
        )

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write ``processor_config.json``, the VLM's processor to the subfolder ``vlm_processor``, and a copy of its
        tokenizer to the top folder, where ``AutoTokenizer`` expects it."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if push_to_hub:
            commit_message = kwargs.pop("commit_message", None)
            repo_id = kwargs.pop("repo_id", folder.name)
            create = {key: kwargs[key] for key in ("token", "private") if key in kwargs}
            repo_id = create_repo(repo_id, exist_ok=True, **create).repo_id
            before = self._get_files_timestamps(folder)
        self.vlm_processor.save_pretrained(folder / VLM_FOLDER)
        self.tokenizer.save_pretrained(folder)
        (folder / CONFIG_FILE).write_text(self.to_json_string(), encoding="utf-8")
        if push_to_hub:
            self._upload_modified_files(folder, repo_id, before, commit_message=commit_message, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        return {
            "processor_class": type(self).__name__,
            "images": self.image_mode,
            "num_frames": self.num_frames,
            "frames": self.frames,
            "image_token_id": self.image_token_id,
            "spatial_tokens": self.spatial_tokens,
            "spatial_token": self._spatial_token,
            "view_image_processor": self.view_image_processor.to_dict(),
        }

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_pretrained(  # ty: ignore[incompatible-method-override]  # options are given by name
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> Self:
        """Load from a folder or the hub.

        Args:
            pretrained_model_name_or_path: Folder or hub id; ``"embedded"``: the one in the package. For a PEFT adapter
                without a processor, the processor of its base model is loaded.
            **kwargs: ``revision``, ``cache_dir``, ``token``, ``local_files_only``, ``force_download`` for the hub;
                arguments of the constructor, which override saved values; the rest goes to the VLM's processor.

        Raises:
            TypeError: A keyword is probably a misspelled argument of the constructor.
            ValueError: The folder contains no :class:`Spa3VLMProcessor`.
        """
        source = resolve(pretrained_model_name_or_path, "spa3_vlm")
        where = {key: kwargs[key] for key in WHERE if key in kwargs}
        if (released := find_released(source, ("spa3-vlm",), cls.__name__, **where)) is not None:
            folder = released.location.folder(["*.json", "*.txt", "*.jinja", "*.model"])
            return cls._from_released(released, folder, kwargs)
        folder = Path(source)
        if not folder.is_dir():
            hub = {key: kwargs[key] for key in (*HUB_KWARGS, "revision") if kwargs.get(key) is not None}
            hub.pop("proxies", None)
            folder = Path(
                snapshot_download(
                    str(pretrained_model_name_or_path), allow_patterns=[CONFIG_FILE, f"{VLM_FOLDER}/*"], **hub
                )
            )
        file = folder / CONFIG_FILE
        fields = _read_fields(file) if file.is_file() else {}
        if not file.is_file() and (adapter := find_adapter(source, **where)) is not None and adapter.base is not None:
            kept = {key: kwargs[key] for key in kwargs if key not in ("revision", "subfolder")}
            return cls.from_pretrained(adapter.base, **kept, **adapter.where)
        if fields.pop("processor_class", None) != cls.__name__:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds no {cls.__name__} ({CONFIG_FILE} is missing or another "
                "class's). Make one with Spa3VLMProcessor.from_vlm_and_spa3r and save it there."
            )
        if "images" in fields:  # its name in files
            fields["image_mode"] = fields.pop("images")
        if unknown := sorted(fields.keys() - inspect.signature(cls.__init__).parameters.keys()):
            raise ValueError(
                f"{file} holds the unknown setting {shorten(unknown[0])}. It is damaged, or a newer version wrote it: "
                "save the processor again."
            )
        fields["view_image_processor"] = Spa3RImageProcessor.from_dict(fields.get("view_image_processor", {}))
        fields: dict[str, Any] = {
            "spatial_tokens": None,
            "spatial_token": None,
            "frames": "uniform",
        } | fields  # older folders lack them
        for_vlm = _for_vlm(kwargs, fields)
        fields |= {key: kwargs[key] for key in fields if key in kwargs}
        return cls(AutoProcessor.from_pretrained(folder / VLM_FOLDER, **for_vlm), **fields)

    @classmethod
    def _from_released(cls, released: ReleasedCheckpoint, folder: Path, kwargs: dict[str, Any]) -> Self:
        """The VLM's processor from the folder of the weights, with a view size derived from the tensors."""
        if not (folder / "tokenizer_config.json").is_file():
            raise ValueError(
                f"{released.name} holds a released Spa3-VLM without a tokenizer (tokenizer_config.json), from which no "
                f"{cls.__name__} can be made. Make one with Spa3VLMProcessor.from_vlm_and_spa3r."
            )
        own = [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "vlm_processor")]
        for_vlm = _for_vlm(kwargs, own)
        size, patch_size = view_size(released.tensors())
        fields: dict[str, Any] = {
            "view_image_processor": Spa3RImageProcessor(size=size, patch_size=patch_size),
            "image_token_id": AutoConfig.from_pretrained(folder).image_token_id,
        }
        fields |= {key: kwargs[key] for key in own if key in kwargs}
        return cls(AutoProcessor.from_pretrained(folder, **for_vlm), **fields)

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Empty: transformers must not handle the parts, as the VLM's processor is saved and loaded as a whole."""
        return []

    @property
    def tokenizer(self) -> Any:  # ty: ignore[incompatible-property-override]  # it belongs to the VLM's processor
        """The VLM's tokenizer."""
        return self.vlm_processor.tokenizer

    @property
    def image_processor(self) -> Any:  # ty: ignore[incompatible-property-override]  # likewise
        """The VLM's image processor."""
        return self.vlm_processor.image_processor

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The VLM's chat template."""
        return self.vlm_processor.chat_template

    @chat_template.setter
    def chat_template(self, value: str | dict[str, str] | None) -> None:
        self.vlm_processor.chat_template = value

    @property
    def model_input_names(self) -> list[str]:
        """Input names of the VLM and of the views."""
        own = [TOKEN_COUNTS] if self.spatial_tokens is None else [TOKEN_COUNTS, SPATIAL_COUNTS]
        return [*self.vlm_processor.model_input_names, *self.view_image_processor.model_input_names, *own]

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(image_mode={self.image_mode!r}, num_frames={self.num_frames}, "
            f"view_image_processor={self.view_image_processor!r}, vlm_processor={self.vlm_processor!r})"
        )

    # Places of appended tokens

    @property
    def spatial_tokens(self) -> int | Literal["patches"] | None:
        """Places for tokens that the model appends to a scene; may be set to the model's ``config.spatial_tokens``."""
        return self._spatial_tokens

    @spatial_tokens.setter
    def spatial_tokens(self, value: int | Literal["patches"] | None) -> None:
        if not (value is None or (isinstance(value, str) and value == "patches") or is_count(value)):
            raise ValueError(
                f"`spatial_tokens` must be a positive number, 'patches' or None, got {value!r}. Take the model's "
                "`config.spatial_tokens`."
            )
        if value is not None:
            self._check_spatial_token()
        self._spatial_tokens = value

    @property
    def spatial_token(self) -> str | None:
        """The token that marks the places of appended tokens."""
        return self._spatial_token or self.tokenizer.pad_token

    @property
    def spatial_token_id(self) -> int | None:
        """Id of :attr:`spatial_token`; must equal the model's ``config.spatial_token_id``."""
        return None if self.spatial_token is None else self.tokenizer.convert_tokens_to_ids(self.spatial_token)

    def _check_spatial_token(self) -> None:
        """Check that the spatial token is a single token that prompts don't contain otherwise."""
        token, tokenizer = self.spatial_token, self.tokenizer
        taken = (tokenizer.eos_token, tokenizer.bos_token, getattr(self.vlm_processor, "image_token", None))
        if (
            token is None
            or token in taken
            or self.spatial_token_id == self.image_token_id
            or tokenizer(token * 2, add_special_tokens=False)["input_ids"] != [self.spatial_token_id] * 2
        ):
            raise ValueError(
                "`spatial_token` must be a special token of the tokenizer that no prompt contains otherwise, got "
                f"{token!r} ({'the padding token' if self._spatial_token is None else 'as given'}). Give the name of "
                "an unused special token of the vocabulary, and its id to the model's `config.spatial_token_id`."
            )

    def _num_spatial_tokens(self, views: Sequence[PIL.Image.Image]) -> int:
        count = self.spatial_tokens
        if not views or count is None:
            return 0
        if count != "patches":
            return count
        side = self.view_image_processor.patch_size
        return sum((view.width // side) * (view.height // side) for view in views)

    def _with_spatial_tokens(self, messages: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
        """The messages with `count` places: where a text already has some, else after the last picture."""
        messages, last, token = [dict(message) for message in messages], None, self.spatial_token or ""
        for message in messages:
            if not isinstance(message.get("content"), list):
                continue
            message["content"] = items = list(message["content"])
            for index, item in enumerate(items):
                if item["type"] == "image":
                    last = (items, index + 1)
                elif token in item.get("text", ""):  # the caller wrote them
                    items[index] = {**item, "text": self._widen_spatial_tokens(item["text"], count)}
                    return messages
        if last is not None:
            items, index = last
            items.insert(index, {"type": "text", "text": token * count})
        return messages

    def _widen_spatial_tokens(self, text: str, count: int) -> str:
        """The text with its run of places extended to `count`."""
        if not count:
            return text
        token = self.spatial_token or ""
        runs = f"(?:{re.escape(token)})+"
        if len(re.findall(runs, text)) != 1:
            raise ValueError(
                f"A text with pictures must have places for appended tokens, {token!r}, once (any number "
                f"in a row), got {len(re.findall(runs, text))} times. Make it with this processor's "
                "apply_chat_template(tokenize=False), or put one right after the last picture."
            )
        return re.sub(runs, lambda _: token * count, text)

    # Pictures

    def vlm_picture(self, view: PIL.Image.Image, original: PIL.Image.Image) -> PIL.Image.Image:
        """The VLM's picture of a view: with ``"aligned"``, the view cropped right and below to whole merged patches."""
        if self.image_mode == "native":
            return original
        unit = self._vlm_unit()
        width, height = (max(side // unit, 1) * unit for side in view.size)
        return view.crop((0, 0, min(width, view.width), min(height, view.height)))

    def _vlm_unit(self) -> int:
        """Side in pixels of an image token in VLMs with dynamic resolution (Qwen: 14 x 2); else 1."""
        for processor, merge_name in (
            (self.vlm_processor.image_processor, "merge_size"),
            (self.vlm_processor, "spatial_merge_size"),  # Pixtral's
        ):
            patch, merge = getattr(processor, "patch_size", None), getattr(processor, merge_name, None)
            if isinstance(patch, int) and isinstance(merge, int):
                return patch * merge
        return 1

    def _load_views(self, pictures: Sequence[Image]) -> tuple[list[PIL.Image.Image], list[PIL.Image.Image]]:
        """Processed views, and the corresponding pictures for the VLM."""
        views, seen = [], []
        for picture in pictures:  # one by one: originals may be large and are often not needed afterwards
            original = to_rgb(picture)
            views.append(self.view_image_processor.process_view(original))
            seen.append(self.vlm_picture(views[-1], original))
        return views, seen

    # Messages

    @property
    def reserved_tokens(self) -> frozenset[str]:
        """Strings that texts of a conversation must not contain: the tokenizer's special tokens, the placeholders of
        pictures, videos and audio, and :attr:`spatial_token`."""
        tokens = set(special_texts(self.vlm_processor))
        if self.image_token_id is not None:
            tokens.add(self.tokenizer.convert_ids_to_tokens(self.image_token_id))
        if self.spatial_tokens is not None and self.spatial_token is not None:
            tokens.add(self.spatial_token)
        return frozenset(token for token in tokens if token.strip())

    def check_messages(self, conversation: Conversations) -> None:
        """Raise for messages that :meth:`apply_chat_template` can't process: not in chat format, or with texts that
        contain :attr:`reserved_tokens`, which would act as tokens. Pictures and videos are not checked.

        Args:
            conversation: A conversation or a list of them.

        Raises:
            ValueError: A message is invalid; the error gives its number and role.
        """
        check_conversations(conversation, self.reserved_tokens)

    def with_frames(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """A conversation in which every video is replaced by its frames, and every picture is an item of type "image".

        Args:
            messages: The conversation. Frames are chosen as by :meth:`apply_chat_template`.

        Raises:
            ValueError: A message is invalid, or a video can't be read.
        """
        self.check_messages(messages)
        options = call_options({}, self.num_frames, self.frames)
        pictures, rewritten = self._pictures_of([dict(message) for message in messages], options, placeholders=False)
        return _with_pictures(rewritten, pictures)

    def apply_chat_template(  # ty: ignore[incompatible-method-override]  # with arguments for videos
        self,
        conversation: Conversations,
        chat_template: str | None = None,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | TensorType | None = TensorType.PYTORCH,
        num_frames: int | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> str | list[str] | ViewBatch | Any:
        """Like the VLM processor's ``apply_chat_template``, with views.

        Texts that contain a special token of the VLM (:attr:`reserved_tokens`) are rejected.

        Args:
            conversation: A conversation or a list of them. A message's content is a text or a list of
                ``{"type": "text", "text": ...}``, ``{"type": "image", "image" | "url" | "path" | "base64": ...}`` and
                ``{"type": "video", "video" | "url" | "path": ...}``. Pictures have any form that
                :class:`~spa3r.Spa3RImageProcessor` takes; videos are files, URLs or lists of frames.
            chat_template: Overrides the VLM's.
            tokenize: Whether to return model inputs instead of text.
            return_dict: With `tokenize`: return all inputs, not only the token ids.
            return_tensors: ``"pt"`` or ``"np"``.
            num_frames: Overrides the processor's. A video item overrides it in turn: ``num_frames`` or ``nframes``;
                ``fps``, ``min_frames``, ``max_frames``; ``video_start``, ``video_end`` in seconds (see
                :class:`~spa3r.media.videos.FrameSampling`).
            processor_kwargs: Keywords for the VLM's processor, as in :meth:`__call__`. Batches are padded on the left
                by default.
            **kwargs: As in transformers (``add_generation_prompt`` and so on); or ``fps`` in place of `num_frames`.

        Returns:
            Text; or token ids; or with `return_dict` the VLM's inputs and ``view_pixel_values`` (sum of N, 3 * p * p),
            ``view_grid_hw`` (views, 2), ``views_per_scene`` (batch,), ``image_tokens_per_scene`` (batch,); with
            `spatial_tokens` also ``spatial_tokens_per_scene`` (batch,).

        Raises:
            ValueError: A picture or video can't be read, a content item is unknown, or :meth:`check_messages` rejects
                the conversation.
        """
        self.check_messages(conversation)
        return self._write(
            conversation, chat_template, tokenize, return_dict, return_tensors, num_frames, processor_kwargs, **kwargs
        )

    def _write(
        self,
        conversation: Conversations,
        chat_template: str | None = None,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | TensorType | None = TensorType.PYTORCH,
        num_frames: int | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> str | list[str] | ViewBatch | Any:
        """`apply_chat_template` for checked conversations; their texts may contain tokens."""
        is_batch = is_batch_of_conversations(conversation)
        if not isinstance(processor_kwargs, Mapping | None):
            raise ValueError(f"`processor_kwargs` must be a dictionary of keywords, got {shorten(processor_kwargs)}.")
        processor_kwargs = dict(processor_kwargs or {})
        check_call(kwargs)
        self._check_keywords(processor_kwargs)
        for_videos = {key: kwargs.pop(key) for key in CALL_OPTIONS if key in kwargs}
        if num_frames is not None:
            for_videos["num_frames"] = num_frames
        for_videos |= {
            key: processor_kwargs.pop(key) for key in (*CALL_OPTIONS, "videos_kwargs") if key in processor_kwargs
        }
        options = call_options(for_videos, self.num_frames, self.frames)
        scenes: list[list[PIL.Image.Image]] = []
        rewritten: list[Any] = []
        conversations: Sequence[Any] = conversation if is_batch else [conversation]
        for messages in conversations:
            pictures, messages = self._pictures_of(messages, options, placeholders=not tokenize)
            if tokenize:
                views, seen = self._load_views(pictures)
                scenes.append(views)
                messages = _with_pictures(messages, seen)
            if self.spatial_tokens is not None:  # in text output, one token is inserted until the views are known
                messages = self._with_spatial_tokens(messages, self._num_spatial_tokens(views) if tokenize else 1)
            rewritten.append(messages)
        if tokenize:
            kwargs["return_tensors"] = return_tensors
            if is_batch:
                processor_kwargs = {"padding": True, "padding_side": "left"} | processor_kwargs
        with TOKENIZING:
            output: Any = self.vlm_processor.apply_chat_template(
                rewritten if is_batch else rewritten[0],
                chat_template=chat_template,
                tokenize=tokenize,
                return_dict=tokenize,
                processor_kwargs=processor_kwargs,
                **kwargs,
            )
        if not tokenize:
            return output
        return self._add_views(output, scenes, return_tensors) if return_dict else output["input_ids"]

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        audio: None = None,
        *,
        return_tensors: str | TensorType | None = TensorType.PYTORCH,
        **kwargs: Unpack[ProcessingKwargs],
    ) -> ViewBatch:
        """Process text that already contains the VLM's placeholders, with its pictures and videos.

        Special tokens in the text act as tokens. Pass untrusted text to :meth:`apply_chat_template`, which rejects
        them.

        Args:
            images: A list of pictures for every text (empty for none); for a single text, its pictures or one picture.
                Or a flat list of the pictures of all texts, each of which takes as many as it has placeholders. A 4-D
                array is a list of pictures.
            text: A text or a list of texts.
            videos: A video, or a list of the videos of all texts in order: files, URLs, lists of frames or 4-D arrays.
                Each video placeholder of a text, as its chat template would write it, is replaced by placeholders for
                the video's frames, which are views like pictures. A text with only picture placeholders uses them for
                the frames of its videos if the numbers match.
            audio: Not supported.
            return_tensors: ``"pt"`` or ``"np"``.
            **kwargs: Keywords for the VLM's processor, as in transformers: flat or as ``text_kwargs``,
                ``images_kwargs``, ``common_kwargs``. For videos, flat or in ``videos_kwargs``: ``num_frames`` or
                ``fps`` (see :class:`~spa3r.media.videos.FrameSampling`), and ``do_sample_frames=False`` to use all
                frames of a list.

        Raises:
            ValueError: A picture or video can't be read, placeholders and media don't match, or a keyword is unknown.
        """
        if audio is not None:
            raise ValueError("`audio` must be None: a Spa3-VLM sees pictures and videos. Leave it out.")
        keywords: dict[str, Any] = {**kwargs}
        self._check_keywords(keywords)
        texts = [text] if isinstance(text, str) else list(text or [])
        options = call_options(keywords, self.num_frames, self.frames)
        clips = [frames_of(video, options) for video in listed_videos(videos)]
        texts, pictures = self._with_frames(texts, self._pictures_by_text(images, texts), clips)
        loaded = [self._load_views(of_text) for of_text in pictures]
        seen = [of_text for _, of_text in loaded]
        if self.spatial_tokens is not None:
            texts = [self._widen_spatial_tokens(t, self._num_spatial_tokens(v)) for t, (v, _) in zip(texts, loaded)]
        with TOKENIZING:
            output = self.vlm_processor(
                text=texts[0] if isinstance(text, str) else texts if text is not None else None,
                images=seen if any(seen) else None,
                return_tensors=return_tensors,
                **keywords,
            )
        return self._add_views(output, [views for views, _ in loaded], return_tensors)

    def _check_keywords(self, keywords: Mapping[str, Any]) -> None:
        """Raise for keywords that neither this class nor the VLM's processor knows."""
        vlm = self.vlm_processor
        typed = getattr(vlm, "valid_processor_kwargs", ProcessingKwargs).__annotations__
        parts = {"text_kwargs": "tokenizer", "images_kwargs": "image_processor", "videos_kwargs": "video_processor"}
        known = {}
        for part, attribute in parts.items():
            of_part = getattr(getattr(getattr(vlm, attribute, None), "valid_kwargs", None), "__annotations__", {})
            known[part] = {*getattr(typed.get(part), "__annotations__", {}), *of_part}
            known[part] |= {*ProcessingKwargs.__annotations__[part].__annotations__}
        flat = {*typed, "common_kwargs", "images", *CALL_OPTIONS}.union(known["text_kwargs"], known["images_kwargs"])
        flat |= {*inspect.signature(type(vlm).__call__).parameters} - {"self", "text", "images", "args", "kwargs"}
        flat -= {"audio_kwargs", "audio"}
        unknown = [str(key) for key in keywords if key not in flat]
        for part in parts.keys() & keywords.keys():
            if not isinstance(keywords[part], Mapping | None):
                raise ValueError(f"`{part}` must be a dictionary of keywords, got {shorten(keywords[part])}.")
            unknown += [f"{part}[{str(key)!r}]" for key in keywords[part] or () if key not in known[part]]
        if unknown:
            raise ValueError(
                f"Neither {type(self).__name__} nor {type(vlm).__name__} takes {', '.join(map(shorten, unknown[:5]))}. "
                "Leave it out, or correct its name; the chat template's own words go to apply_chat_template(...)."
            )

    def _places(self) -> tuple[str | None, str | None]:
        """Placeholders of a picture and of a video in texts of the chat template; None if they are unknown."""
        picture, video = (getattr(self.vlm_processor, f"{kind}_token", None) for kind in ("image", "video"))
        if not picture or not video or picture == video:
            return None, None
        place, words = picture, {"type": "text", "text": "Spa3R"}
        asked: list[Any] = [
            [{"role": "user", "content": [*([{"type": "image"}] * count), words]}] for count in range(3)
        ]
        try:
            with TOKENIZING:
                without, with_one, with_two = map(self.vlm_processor.apply_chat_template, asked)
        except Exception:  # no template, or one of another form: use the bare token
            return place, video
        head, tail = without.split("Spa3R", 1)
        if with_one.startswith(head) and with_one.endswith(f"Spa3R{tail}"):
            between = with_one[len(head) : len(with_one) - len(tail) - len("Spa3R")]
            if between.count(picture) == 1 and with_two == f"{head}{between * 2}Spa3R{tail}":
                place = between
        return place, place.replace(picture, video)

    def _with_frames(
        self, texts: list[str], pictures: list[list[Image]], clips: list[list[Image]]
    ) -> tuple[list[str], list[list[Image]]]:
        """The texts with picture placeholders in place of video placeholders, and their pictures including frames."""
        video_token = getattr(self.vlm_processor, "video_token", None)
        if not clips and not any(places_of(texts, video_token)):
            return texts, pictures
        places: Any = self._places()
        picture_place, video_place = places
        counts, bare = places_of(texts, video_place), places_of(texts, video_token)
        token: Any = getattr(self.vlm_processor, "image_token", None)
        if clips and not any(bare) and len(texts) == 1 and not pictures[0]:
            frames = [frame for clip in clips for frame in clip]
            if token and texts[0].count(token) == len(frames):  # a text made from the messages
                return texts, [frames]
        if bare != counts or sum(counts) != len(clips):
            raise ValueError(
                f"The texts must have as many places for videos, {video_place!r} of this VLM, as there are `videos`, "
                f"{len(clips)}, got {sum(counts)} of them, {sum(bare)} video tokens and "
                f"{sum(places_of(texts, token))} picture tokens. Give the messages with their videos to "
                "apply_chat_template(tokenize=True, return_dict=True), which makes all of it."
            )
        remaining, texts, pictures = iter(clips), list(texts), list(pictures)
        for row, count in enumerate(counts):
            if not count:
                continue
            of_text, mixed, text = iter(pictures[row]), [], ""
            if texts[row].count(token) != len(pictures[row]):
                raise ValueError(
                    f"A text with videos must have a place for each of its pictures, {len(pictures[row])}, got "
                    f"{texts[row].count(token)}. Put {picture_place!r} where a picture belongs."
                )
            for piece in re.split(f"({re.escape(video_place)}|{re.escape(token)})", texts[row]):
                if piece == video_place:
                    clip = next(remaining)
                    mixed += clip
                    text += picture_place * len(clip)
                else:
                    mixed += [next(of_text)] if piece == token else []
                    text += piece
            texts[row], pictures[row] = text, mixed
        return texts, pictures

    def _pictures_by_text(self, images: Any, texts: list[str]) -> list[list[Image]]:
        """The pictures of each text."""
        if images is None:
            return [[] for _ in texts]
        is_list = isinstance(images, list | tuple)
        lists = [p is None or isinstance(p, list | tuple) or is_batch(p) for p in images] if is_list else []
        if any(lists):
            if not all(lists):
                raise ValueError(
                    "`images` must hold either pictures or lists of pictures, got both. Put every text's pictures in a "
                    "list, a single one too."
                )
            nested = [flattened(pictures if pictures is not None else ()) for pictures in images]
            if len(nested) != len(texts):
                raise ValueError(
                    f"`images` must have one list of pictures for each of the {len(texts)} texts, got {len(nested)}. "
                    "Give an empty list for a text without pictures."
                )
            return nested
        flat = flattened(images if is_list else [images])
        if len(texts) == 1:
            return [flat]
        token = getattr(self.vlm_processor, "image_token", None)
        counts = [text.count(token) if token else 0 for text in texts]
        if not any(counts) and len(flat) == len(texts):  # for processors that write the placeholders themselves
            counts = [1] * len(texts)
        if sum(counts) != len(flat):
            raise ValueError(
                f"`images` must have one list of pictures for each of the {len(texts)} texts, or as many pictures as "
                f"the texts have placeholders ({' + '.join(map(str, counts))}), got {len(flat)} pictures."
            )
        remaining = iter(flat)
        return [list(islice(remaining, count)) for count in counts]

    def _add_views(
        self, output: BatchFeature, scenes: list[list[PIL.Image.Image]], return_tensors: str | TensorType | None
    ) -> ViewBatch:
        views = self.view_image_processor.pack(scenes, return_tensors)
        counts = {}
        if self.image_token_id is not None:
            ids = output["input_ids"]
            if not hasattr(ids, "shape"):  # lists of different lengths
                counts[TOKEN_COUNTS] = [sum(token == self.image_token_id for token in row) for row in ids]
            else:
                counts[TOKEN_COUNTS] = (ids == self.image_token_id).sum(-1)
        if self.spatial_tokens is not None:
            counts[SPATIAL_COUNTS] = self._count_spatial_tokens(output)
        return ViewBatch({**output, **views, **counts})

    def _count_spatial_tokens(self, output: BatchFeature) -> Any:
        """Number of places in every row; padding may use the same token."""
        ids, mask = output["input_ids"], output.get("attention_mask")
        if hasattr(ids, "shape"):
            places = ids == self.spatial_token_id
            return (places if mask is None else places & (mask != 0)).sum(-1)
        masks = mask or [[1] * len(row) for row in ids]
        return [
            sum(token == self.spatial_token_id and bool(real) for token, real in zip(*pair)) for pair in zip(ids, masks)
        ]

    def _pictures_of(
        self, messages: Sequence[dict[str, Any]], options: Mapping[str, Any], placeholders: bool
    ) -> tuple[list[Image], list[dict[str, Any]]]:
        """All pictures of a conversation in order, and the messages with an empty image item for each.

        `options` set the frames of videos whose items don't set them. With `placeholders`, an item
        ``{"type": "image"}`` may come without its picture; only text can be made from it.
        """
        pictures: list[Image] = []
        rewritten = []
        for message in messages:
            content = message.get("content")
            if not isinstance(content, list | tuple):
                rewritten.append(message)
                continue
            items = []
            for item in content:
                if placeholders and dict(item) == {"type": "image"}:
                    items.append(item)
                    continue
                new = _pictures_of_item(item, options)
                pictures += new
                items += [{"type": "image"}] * len(new) if item.get("type") != "text" else [item]
            rewritten.append({**message, "content": items})
        return pictures, rewritten

    # Text

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        return self.vlm_processor.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        return self.vlm_processor.decode(*args, **kwargs)

    def post_process_image_text_to_text(self, *args: Any, **kwargs: Any) -> list[str]:
        return self.vlm_processor.post_process_image_text_to_text(*args, **kwargs)


def _pictures_of_item(item: dict[str, Any], options: Mapping[str, Any]) -> list[Image]:
    """The pictures of one item of a message's content; `options` apply if it is a video."""
    kind = item.get("type")
    if kind == "text":
        return []
    if kind in ("image", "image_url") and (unused := [key for key in SIZE_KEYS if item.get(key) is not None]):
        raise ValueError(
            f"A picture's {', '.join(map(repr, unused))} can't be used: views have the size of the processor's "
            "`view_image_processor`. Leave it out, and set `processor.view_image_processor.size` for another."
        )
    if kind == "image_url":  # OpenAI's form
        url = item.get("image_url", item.get("url"))
        return [url.get("url") if isinstance(url, Mapping) else url]
    if kind not in ("image", "video"):
        raise ValueError(
            f"A content item must have type 'text', 'image' or 'video', got {shorten(kind)}. Leave it out: a "
            "Spa3-VLM sees pictures and videos."
        )
    keys = PICTURE_KEYS if kind == "image" else VIDEO_KEYS
    media = next((item[key] for key in keys if item.get(key) is not None), None)
    if media is None:
        raise ValueError(
            f"A content item of type {kind!r} must hold its {kind} under one of {', '.join(map(repr, keys))}, got the "
            f"keys {shorten(sorted(map(str, item)))}. Or make the text first (tokenize=False) and pass pictures to "
            "processor(images=...)."
        )
    if kind == "image":
        is_bare = isinstance(media, str) and media is item.get("base64") and media[:5].lower() != "data:"
        return flattened([f"data:;base64,{media}" if is_bare else media])
    if not hasattr(media, "__iter__") and not isinstance(media, Path):
        raise ValueError(f"A video must be a file, a URL or a list of frames, got {shorten(media)}.")
    return frames_of(media, options_of_item(item, options))


def _with_pictures(messages: Sequence[dict[str, Any]], pictures: Sequence[Image]) -> list[dict[str, Any]]:
    """The messages with the pictures put into their image items."""
    remaining = iter(pictures)
    return [
        message
        if not isinstance(message.get("content"), list)
        else {
            **message,
            "content": [
                {"type": "image", "image": next(remaining)} if item.get("type") == "image" else item
                for item in message["content"]
            ],
        }
        for message in messages
    ]


def _for_vlm(kwargs: Mapping[str, Any], own: Collection[str]) -> dict[str, Any]:
    """Keywords of ``from_pretrained`` for the VLM's processor, which takes any; `own` are those of our constructor."""
    rest = {name: value for name, value in kwargs.items() if name not in (*own, *NOT_FOR_VLM)}
    for name in rest:  # as in configurations: a near match is a typo of ours
        if near := difflib.get_close_matches(name, own, 1, cutoff=0.9):
            raise TypeError(f"`{name}` is no argument of Spa3VLMProcessor: did you mean `{near[0]}`?")
    return rest


def _read_fields(file: Path) -> dict[str, Any]:
    """Fields of a saved processor's file."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} can't be read as JSON ({error}). It is damaged: save the processor again.") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("view_image_processor", {}), dict):
        raise ValueError(f"{file} must hold a processor's settings by name. It is damaged: save the processor again.")
    return fields


def check_messages(processor: ProcessorMixin, conversations: Conversations) -> None:
    """:meth:`Spa3VLMProcessor.check_messages`, also for the processor of a VLM.

    Args:
        processor: A :class:`Spa3VLMProcessor`, or a processor of transformers.
        conversations: A conversation or a list of them.

    Raises:
        ValueError: A message is invalid; the error gives its number and role.
    """
    own = isinstance(processor, Spa3VLMProcessor)
    check_conversations(conversations, processor.reserved_tokens if own else special_texts(processor))


def prompt_inputs(
    processor: ProcessorMixin, conversations: Sequence[Sequence[Mapping[str, Any]]], **kwargs: Any
) -> BatchFeature:
    """A batch of prompts, padded on the left: the inputs of ``generate`` for answers to the last messages.

    Args:
        processor: A :class:`Spa3VLMProcessor`, or a processor of transformers.
        conversations: A list of conversations; see :meth:`Spa3VLMProcessor.apply_chat_template`.
        **kwargs: Other arguments of ``apply_chat_template``.

    Raises:
        ValueError: A message is invalid, or a picture can't be read.
    """
    check_messages(processor, list(conversations))
    batch: list[Any] = list(conversations)
    with nullcontext() if isinstance(processor, Spa3VLMProcessor) else TOKENIZING:
        inputs: Any = processor.apply_chat_template(
            batch,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs={"padding": True, "padding_side": "left"},
            **kwargs,
        )
    return inputs


__all__ = ["Spa3VLMProcessor"]
