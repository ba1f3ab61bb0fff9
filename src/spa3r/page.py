"""Pages of ``spa3r demo`` and ``spa3r eval report``: single HTML files with their pictures, without scripts.

The templates are in ``templates/``; every value in them is escaped.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import PIL.Image

from spa3r.vsi_bench.format import TYPE_TITLES, is_choice
from spa3r.vsi_bench.scoring import parse_prediction


@dataclass(frozen=True)
class Answer:
    """An answer on a page.

    Attributes:
        title: Who answers.
        text: The answer.
        score: Between 0 and 1; None: left out of the scores.
        kind: CSS class of its color: ``"with"`` or ``"without"``.
    """

    title: str
    text: str
    score: float | None
    kind: str = "with"


@dataclass(frozen=True)
class Question:
    """A question on a page, with its answers.

    Attributes:
        question_type: Type of VSI-Bench.
        text: The question, without its options.
        options: Options of a choice, such as ``"A. left"``; empty for a number.
        truth: A number, or the letter of an option.
        answers: The answers.
    """

    question_type: str
    text: str
    options: Sequence[str]
    truth: str
    answers: Sequence[Answer]

    @property
    def title(self) -> str:
        """Short title of the type."""
        return TYPE_TITLES[self.question_type]

    @property
    def scoring(self) -> str:
        """How answers are scored, in words."""
        return "right or wrong" if is_choice(self.question_type) else "the nearer the better"

    def is_true(self, option: str) -> bool:
        """Whether an option is the true one."""
        return parse_prediction(option).upper() == parse_prediction(self.truth).upper()

    def option_of(self, answer: str) -> str:
        """The rest of the option that an answer is the letter of; empty if there is none."""
        return next((option[len(answer) :] for option in self.options if option.startswith(f"{answer}.")), "")


def render_page(template: str, facts: Mapping[str, str], note: str = "", command: str = "", **values: Any) -> str:
    """An HTML document without scripts and other files.

    Args:
        template: Name of a template that extends ``page.html``.
        facts: Key facts by name.
        note: A warning at the top, for example that the answers come from untrained weights.
        command: The command that creates the page again.
        **values: Further values of the template.
    """
    return environment().get_template(template).render(facts=facts, note=note, command=command, **values)


def environment() -> jinja2.Environment:
    """The environment of all templates, with autoescaping; a missing value is an error."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("spa3r"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["sentence"] = lambda text: f"{text[0].upper()}{text[1:].rstrip('.')}."
    return templates


def data_url(picture: PIL.Image.Image, shortest: int = 1, kind: str = "png", **options: Any) -> str:
    """A picture as the address of an ``img`` element.

    Args:
        picture: The picture.
        shortest: Pixels of the longer side; smaller pictures are enlarged by a whole factor without blur, which a
            browser would add.
        kind: File format.
        **options: Options of Pillow's ``save``.
    """
    factor, file = -(-shortest // max(picture.size)), io.BytesIO()
    width, height = (factor * side for side in picture.size)
    picture.resize((width, height), PIL.Image.Resampling.NEAREST).save(file, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
