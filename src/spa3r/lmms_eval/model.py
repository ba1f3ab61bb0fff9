"""Spa3-VLM as a model of lmms-eval, ``python -m lmms_eval --model spa3r``."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from transformers import GenerationConfig
from transformers.utils import logging

from spa3r.answering.engine import AnsweringEngine
from spa3r.checkpoints import EMBEDDED
from spa3r.console import Dtype, embedded_note, load_vlm
from spa3r.media.videos import sample_frames

logger = logging.get_logger(__name__)

DEFAULT_UNTIL = ["\n\n"]
"""lmms-eval's default stop string for tasks that set none: the separator of the examples in a few-shot prompt."""

GREEDY = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Sampling parameters, which have no effect without sampling."""


Files = tuple[tuple[str, str], ...]
"""Files of a scene: ``("image" | "video", file)``."""


class Spa3VLMForLmmsEval(lmms):
    """A Spa3-VLM for lmms-eval with chat messages. All pictures and videos of a question are views of one scene.

    The arguments are those of ``--model_args``, and ``--batch_size`` and ``--device``.

    Args:
        pretrained: A folder, a hub id, or ``"embedded"``.
        batch_size: Number of questions per batch, padded on the left.
        device: Such as ``"cuda:0"``; None: the first of cuda, mps, cpu. With several processes, accelerate sets it.
        dtype: ``"auto"`` (as saved, and on CPUs as with ``spa3r ask``), ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        attn_implementation: Attention back end; None: the fastest available.
        num_frames: Number of frames of a video: ``linspace(0, n - 1, num_frames)``. VSI-Bench's evaluation uses 32.
        max_batch_size: Ignored; lmms-eval passes it to every model.
        **unknown: Raises an error.

    Raises:
        ValueError: An argument is unknown, or out of its range.
    """

    is_simple = False  # uses chat messages

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        num_frames: int = 32,
        max_batch_size: int | None = None,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            raise ValueError(
                "`--model_args` must be of pretrained, dtype, attn_implementation and num_frames, got "
                f"{', '.join(unknown)}. Leave it out; lmms-eval's own options are listed by `python -m lmms_eval -h`."
            )
        if dtype not in list(Dtype):
            raise ValueError(f"`dtype` must be one of {', '.join(Dtype)}, got {dtype!r}.")
        self.batch_size = _at_least_1("batch_size", batch_size)
        self.num_frames = _at_least_1("num_frames", num_frames)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        place = str(self.accelerator.device) if self._world_size > 1 else device or "auto"
        note = logger.info if self._rank == 0 else logger.debug
        self.model, self.processor = load_vlm(str(pretrained), place, Dtype(dtype), attn_implementation, note)
        self.device, self.engine = self.model.device, AnsweringEngine(self.model, self.processor)
        if pretrained == EMBEDDED and self._rank == 0:
            logger.warning(embedded_note())

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answer lmms-eval's requests, in their order.

        Questions are batched by equal ``generation_kwargs``. If several questions of a task are about the same files,
        the scene is encoded once (:meth:`~spa3r.Spa3VLMForConditionalGeneration.encode_scene`).

        All ``generation_kwargs`` that transformers' ``generate`` knows are used: ``max_new_tokens`` (128 if missing),
        ``num_beams``, ``repetition_penalty`` and so on; a warning names the rest. Decoding is greedy unless a
        temperature above 0 or ``do_sample: true`` is set. An answer ends before the first string of ``until``. A lone
        ``"\\n\\n"``, lmms-eval's default for tasks without a stop string, is ignored as in lmms-eval's own Qwen models:
        it would cut an answer after its first paragraph.

        Args:
            requests: Requests of type ``generate_until``, of any tasks.

        Raises:
            ValueError: A question contains unsupported content (audio, a part of a video), or unreadable media.
        """
        answers = [""] * len(requests)
        groups = defaultdict(list)
        for index, request in enumerate(requests):
            groups[json.dumps(request.args[2], sort_keys=True, default=str)].append(index)
        with logging.tqdm(total=len(requests), desc="Answering", disable=self.rank != 0) as bar:
            for indices in groups.values():
                arguments, until = _generation_arguments(requests[indices[0]].args[2])
                for some, texts in self._answers(requests, indices, arguments, shares=not until):
                    for index, text in zip(some, texts):
                        answers[index] = _before(until, text).strip()
                    bar.update(len(some))
        return answers

    def _answers(
        self, requests: Sequence[Instance], indices: Sequence[int], arguments: Mapping[str, Any], shares: bool
    ) -> Iterator[tuple[list[int], list[str]]]:
        """Answers batch by batch; with `shares`, first those about scenes that several questions share."""
        waiting = dict.fromkeys(indices)
        for files, asked in self._scenes(requests, indices).items() if shares else ():
            texts = self._ask(files, [question for _, question in asked], arguments)
            for index, _ in asked:
                del waiting[index]
            yield [index for index, _ in asked], texts
        waiting = list(waiting)
        for start in range(0, len(waiting), self.batch_size):
            batch = waiting[start : start + self.batch_size]
            conversations = [self._messages(requests[index]) for index in batch]
            yield batch, self.engine.generate(conversations, self.num_frames, **arguments)

    def _scenes(self, requests: Sequence[Instance], indices: Sequence[int]) -> dict[Files, list[tuple[int, str]]]:
        """Indices and texts of the questions that share the same files.

        A task whose first question has another form is skipped, since its pictures would be read twice.
        """
        scenes, others = defaultdict(list), set()
        for index in indices:
            task = requests[index].args[4]
            if task not in others:
                if (about := _files_and_question(self._messages(requests[index]))) is None:
                    others.add(task)
                else:
                    scenes[about[0]].append((index, about[1]))
        return {files: asked for files, asked in scenes.items() if len(asked) > 1}

    def _ask(self, files: Files, questions: Sequence[str], arguments: Mapping[str, Any]) -> list[str]:
        views = [
            view
            for kind, file in files
            for view in (sample_frames(file, self.num_frames) if kind == "video" else [file])
        ]
        return self.engine.about(views)(questions, batch_size=self.batch_size, **arguments)

    def _messages(self, request: Instance) -> list[dict[str, Any]]:
        """The question's messages, with media under ``url`` as our processor takes them."""
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        for item in (item for message in messages for item in _items(message)):
            kind, media = item["type"], item.get("url")
            is_part = item.get("start_time") is not None or item.get("end_time") is not None or isinstance(media, dict)
            if kind not in ("text", "image", "video") or is_part:
                raise ValueError(
                    f"Question {doc_id} of task {task} must be of text, pictures and whole videos, got "
                    f"{'a part of a ' if is_part else ''}{kind}. Leave the task out: Spa3-VLM can't be asked this."
                )
        return messages

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not supported: a Spa3-VLM is scored by its generated answers.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "spa3r must be asked by tasks of output_type generate_until, got one of loglikelihood or multiple_choice. "
            "Spa3-VLM is scored by what it says: take the task's generative form."
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not supported.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "spa3r must be asked by tasks of output_type generate_until, got one of generate_until_multi_round. Leave "
            "the task out: its next question depends on the last answer, and each question here stands alone."
        )


def _at_least_1(name: str, value: Any) -> int:
    if not str(value).isdecimal() or int(value) < 1:
        raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
    return int(value)


def _items(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _files_and_question(messages: Sequence[Mapping[str, Any]]) -> tuple[Files, str] | None:
    """Split one message of files and then a text: kinds and names of the files, and the text."""
    *media, last = _items(messages[-1])
    is_plain = len(messages) == 1 and messages[0]["role"] == "user" and media and last["type"] == "text"
    if not is_plain or not all(item["type"] != "text" and isinstance(item.get("url"), str) for item in media):
        return None
    return tuple((item["type"], item["url"]) for item in media), last["text"]


def _generation_arguments(generation_kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Convert a task's ``generation_kwargs`` to arguments of transformers' ``generate`` and stop strings."""
    arguments = {key: value for key, value in generation_kwargs.items() if value is not None}
    until = arguments.pop("until", [])
    until = [until] if isinstance(until, str) else list(until)
    temperature = arguments.get("temperature")
    samples = arguments.pop("do_sample", bool(temperature)) and temperature != 0
    unknown = arguments.keys() - GenerationConfig().to_dict().keys()
    if unknown:
        logger.warning_once(
            "Of `generation_kwargs` spa3r uses what transformers' `generate` knows, and leaves out "
            f"{', '.join(sorted(unknown))}."
        )
    left_out = unknown if samples else unknown | set(GREEDY)
    arguments = {key: value for key, value in arguments.items() if key not in left_out}
    return arguments | {"do_sample": bool(samples)}, [] if until == DEFAULT_UNTIL else [stop for stop in until if stop]


def _before(until: Sequence[str], text: str) -> str:
    for stop in until:
        text = text.split(stop)[0]
    return text
