"""Batches of questions about rooms for a language model, and the meaning of its tokens.

The frozen parts have already processed the pictures, so batches have placeholders instead of pictures.
"""

import re

import numpy as np
import torch
from conversations import DESCRIBE, FRAMES, WORDS, Conversations
from free_wording import Turn
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spa3r.rooms import FURNITURE
from spa3r.vsi_bench.format import FIRST_WORDS

SPATIAL = re.compile("the distance between|is the closest to|standing by|You are a robot")
"""Matches questions whose answers depend on where objects are."""

PARTS = ("free", "spatial", "other")
"""Kinds of questions: in free wording; and in the wording of VSI-Bench or of `DESCRIBE`, those that match `SPATIAL`,
which are learned last, and the others."""

LOOKING = 2
"""Number of language model layers after which names of objects contain the information from the pictures."""

CODE_WIDTH = 18


def calculating(language_model: nn.Module) -> nn.Module:
    """The layers after the first `LOOKING` ones."""
    return nn.ModuleList([*language_model.layers[LOOKING:], language_model.norm])


def part_of(question: str) -> str:
    """The kind of a question, one of `PARTS`."""
    if not question.startswith((FIRST_WORDS, DESCRIBE)):
        return "free"
    return "spatial" if SPATIAL.search(question) else "other"


def place_code(places: Tensor, width: int = 128) -> Tensor:
    """The code that an adapter adds to image tokens to encode the position of the object they show.

    It is linear for short distances, with sines and cosines for the whole room, so that sums and differences are easy.

    Args:
        places: (..., 2), meters to the right and ahead, seen from the first picture.
        width: Width of the image tokens.

    Returns:
        (..., width), zeros after the first `CODE_WIDTH` entries.
    """
    turns = 2 * torch.pi * places[..., None] / torch.tensor([3.0, 6.0, 12.0, 24.0])
    code = 2 * torch.cat([places / 3, turns.sin().flatten(-2), turns.cos().flatten(-2)], -1)
    return nn.functional.pad(code, (0, width - code.shape[-1]))


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss of logits (batch, sequence, vocabulary) and labels (batch, sequence - 1) of the next tokens."""
    is_answer = labels >= 0
    return nn.functional.cross_entropy(logits[:, :-1][is_answer].float(), labels[is_answer])


class Questions:
    """Batches for a VLM: all questions about a room share its pictures, and none attends to another.

    The VLM processes each question as if it were asked alone, at a fraction of the cost.

    Args:
        conversations: The questions.
        vlm: The VLM, which computes position ids.
        tokenizer: The VLM's tokenizer.
        cells: Image tokens of each picture.
        appended: Placeholders for spatial tokens after the last picture.
        frames: Number of pictures; 0: questions alone, and only those whose answers depend on where objects are.
        free: Share of the questions in free wording; three of four others are about where objects are.
    """

    def __init__(
        self,
        conversations: Conversations,
        vlm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        cells: int,
        appended: int = 0,
        frames: int = FRAMES,
        free: float = 0.375,
    ):
        self.free = free
        self.tokenizer = tokenizer
        self.turns: list[dict[str, list[Turn]]] = []
        for turns in conversations.turns:
            self.turns.append({part: [] for part in PARTS})
            for turn in turns:
                self.turns[-1][part_of(turn[0])].append(turn)
        user = {"role": "user", "content": "<image>"}
        prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        before, self.after = prompt.split("<image>")
        picture = f"<|vision_start|>{tokenizer.image_token * cells}<|vision_end|>"
        shared = torch.tensor(tokenizer.encode(before + picture * frames + tokenizer.pad_token * appended))
        self.is_picture = shared == tokenizer.image_token_id
        side = 2 * round(cells**0.5)  # patches; the VLM merges 2 x 2
        grid = torch.tensor([[1, side, side]] * frames) if frames else None
        self.shared_places = vlm.base_model.get_rope_index(
            shared[None], mm_token_type_ids=self.is_picture[None].int(), image_grid_thw=grid
        )[0][:, 0]
        self.shared = shared
        self.word_of = torch.full((len(tokenizer),), -1)
        for number, word in enumerate(WORDS):
            self.word_of[tokenizer.encode(word)[-1]] = number

    def draw(self, rng: np.random.Generator, rooms: int, questions: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw rooms and questions about each.

        Returns:
            Numbers of the rooms (rooms,), and the VLM's text inputs: ``input_ids``, ``labels``,
            ``mm_token_type_ids`` (rooms, sequence), ``position_ids`` (3, rooms, sequence) and ``attention_mask``
            (rooms, 1, sequence, sequence), added to the attention logits.
        """
        drawn = rng.integers(len(self.turns), size=rooms)
        parts = {"ids": [], "labels": [], "places": [], "numbers": []}
        for room in drawn:
            free = round(self.free * questions)
            spatial = questions - free - (questions - free) // 4
            numbers = (free, spatial, questions) if self.is_picture.any() else (0, questions, 0)
            turns: list[Turn] = []
            for part, number in zip(PARTS, numbers):
                some = self.turns[room][part]
                turns += [some[i] for i in rng.permutation(len(some))[: min(number, questions - len(turns))]]
            asked = self.tokenizer([question + self.after for question, _ in turns]).input_ids
            answered = self.tokenizer([f"{answer}{self.tokenizer.eos_token}" for _, answer in turns]).input_ids
            row = {
                "ids": [self.shared],
                "labels": [torch.full_like(self.shared, -100)],
                "places": [self.shared_places.T],
                "numbers": [torch.zeros_like(self.shared)],
            }
            for number, (question, answer) in enumerate(zip(asked, answered), start=1):
                row["ids"].append(torch.tensor(question + answer))
                row["labels"].append(torch.tensor([-100] * len(question) + answer))
                places = self.shared_places.max() + 1 + torch.arange(len(question + answer))
                row["places"].append(places[:, None].expand(-1, 3))
                row["numbers"].append(torch.full_like(places, number))
            for name, pieces in row.items():
                parts[name].append(torch.cat(pieces))
        fill = {"ids": self.tokenizer.pad_token_id, "labels": -100, "places": 0, "numbers": -1}
        ids, labels, places, numbers = (
            nn.utils.rnn.pad_sequence(parts[name], batch_first=True, padding_value=value)
            for name, value in fill.items()
        )
        sees = (numbers[:, None, :] == 0) | (numbers[:, None, :] == numbers[:, :, None])
        mask = torch.zeros(sees.shape)
        hidden = ~(sees & (numbers[:, None, :] >= 0)).tril()
        mask.masked_fill_(hidden, torch.finfo(torch.bfloat16).min)  # finite in bfloat16, too
        return torch.from_numpy(drawn), {
            "input_ids": ids,
            "labels": labels,
            "mm_token_type_ids": (ids == self.tokenizer.image_token_id).int(),
            "position_ids": places.permute(2, 0, 1),
            "attention_mask": mask[:, None],
        }

    def named(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Kinds and colors (rooms, sequence), numbers among `WORDS`, that question tokens name; -1 for none."""
        words, is_kind = self.word_of[ids], self.word_of[ids] < len(FURNITURE)
        before = nn.functional.pad(words, (1, -1), value=-1)  # a color comes before a kind
        is_kind &= torch.arange(ids.shape[1]) >= len(self.shared)
        kinds = words.where(is_kind, torch.tensor(-1))
        return kinds, before.where((kinds >= 0) & (before >= len(FURNITURE)), torch.tensor(-1))

    def shows(self, ids: Tensor, names: Tensor) -> Tensor:
        """(rooms, sequence, cells): which cells of the pictures show the object that a question token names.

        Args:
            ids: (rooms, sequence).
            names: (rooms, cells, words), what each cell shows.
        """
        kinds, colors = self.named(ids)
        of_word, room = names.transpose(1, 2), torch.arange(len(ids))[:, None]
        shows = of_word[room, kinds] & (kinds >= 0)[..., None]
        return shows & (of_word[room, colors] | (colors < 0)[..., None])

    def meant(self, ids: Tensor, words: Tensor, middles: Tensor) -> tuple[Tensor, Tensor]:
        """The positions of the objects that question tokens name.

        Args:
            ids: (rooms, sequence).
            words: (rooms, objects, 2), kind and color.
            middles: (rooms, objects, 2).

        Returns:
            Positions (rooms, sequence, 2), and a mask (rooms, sequence): exactly one object has the name.
        """
        kinds, colors = (part[..., None] for part in self.named(ids))
        fits = (kinds == words[:, None, :, 0]) & (kinds >= 0) & ((colors == words[:, None, :, 1]) | (colors < 0))
        return fits.float() @ middles, fits.sum(-1) == 1

    def looking(self, attentions: tuple[Tensor, ...], shows: Tensor) -> Tensor:
        """-log of the share of attention from an object's name to the cells that show it, for two heads in two layers.

        Without this loss, words attend to pictures only after tens of thousands of conversations.

        Args:
            attentions: Attention of every layer, (rooms, heads, sequence, sequence).
            shows: (rooms, sequence, cells).
        """
        attention = torch.stack([layer[:, :2] for layer in attentions[:2]], 1)[..., : len(self.shared)]
        shares = (attention[..., self.is_picture].float() * shows[:, None, None]).sum(-1)
        return -(shares + 1e-3).log().mean((1, 2))[shows.any(-1)].mean()
