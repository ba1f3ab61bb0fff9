"""Photos -> packed views: any pictures, any number of views a scene, any sizes in a batch."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.request import Request, urlopen

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from einops import rearrange
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import TensorType

from spa3r.checkpoints import resolve
from spa3r.checks import check_channels, check_count, is_count, shorten

Image = PIL.Image.Image | str | Path | np.ndarray | Tensor
"""A PIL image, a path or URL, or an array or tensor: (H, W), (H, W, 1|3|4) or (1|3|4, H, W); uint8 in [0, 255], or
floating point in [0, 1], or 16-bit in [0, 65535]."""

Mode = Literal["crop", "pad", "pretraining"]
"""How a picture becomes a view, see :class:`Spa3RImageProcessor`."""

MAX_SIZE = 16384
"""Of a view's side in pixels."""

LAYOUT_KEYS = ("view_grid_hw", "views_per_scene", "image_tokens_per_scene", "spatial_tokens_per_scene")


class ViewBatch(BatchFeature):
    """A BatchFeature whose ``.to(device)`` leaves the layout (``view_grid_hw``, ``views_per_scene``,
    ``image_tokens_per_scene``) on the CPU: the models read it as Python integers, which from an accelerator would make
    the host wait."""

    def to(self, *args, **kwargs) -> ViewBatch:
        layout = {key: self.data[key] for key in LAYOUT_KEYS if key in self.data}
        super().to(*args, **kwargs)
        self.data.update(layout)
        return self


class Spa3RImageProcessor(BaseImageProcessor):
    """Resizes views as VGGT was trained, and packs the patches of all views of all scenes into one sequence.

    Args:
        size: Width (crop, pretraining) or longest side (pad) of a processed view in pixels, a multiple of `patch_size`.
        patch_size: Side of a patch in pixels.
        mode: ``"crop"``: width to `size`, height in proportion to a multiple of the patch, the middle of it if it
            exceeds `size`. ``"pad"``: longest side to `size`, white margins to a square. ``"pretraining"``: width to
            `size`, height in exact proportion, the middle of it that is a multiple of the patch, without a limit; how
            Spa3R was pretrained.
        image_mean: Mean of the normalisation, by channel.
        image_std: Standard deviation of the normalisation, by channel; above 0.

    Raises:
        ValueError: A value has the wrong type or is out of range.
    """

    model_input_names = ["view_pixel_values", "view_grid_hw", "views_per_scene"]

    def __init__(
        self,
        size: int = 518,
        patch_size: int = 14,
        mode: Mode = "crop",
        image_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        image_std: Sequence[float] = IMAGENET_DEFAULT_STD,
        **kwargs,
    ):
        super().__init__(**kwargs)
        patch_size = check_count("patch_size", patch_size, highest=256)
        if not is_count(size, patch_size, MAX_SIZE) or size % patch_size:
            raise ValueError(
                f"`size` must be a positive multiple of `patch_size` = {patch_size}, got {shorten(size)}"
                f"{f', above the limit of {MAX_SIZE} pixels' if is_count(size, MAX_SIZE) else ''}."
            )
        _check_mode(mode)
        self.size, self.patch_size, self.mode = int(size), patch_size, mode
        self.image_mean = check_channels("image_mean", image_mean)
        self.image_std = check_channels("image_std", image_std, 0, above=True, cure="Pixels are divided by it.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> Spa3RImageProcessor:
        """As transformers' ``from_pretrained``; ``"embedded"`` names the checkpoint in the package."""
        return super().from_pretrained(resolve(pretrained_model_name_or_path), **kwargs)

    def preprocess(
        self,
        images: Image | Sequence[Image] | Sequence[Sequence[Image]],
        return_tensors: str | TensorType | None = TensorType.PYTORCH,
        mode: Mode | None = None,
    ) -> ViewBatch:
        """
        Args:
            images: A list of scenes, each a list of pictures; or the pictures of one scene; or one picture.
            return_tensors: ``"pt"``, ``"np"``, or None for lists of arrays.
            mode: Overrides the processor's.

        Returns:
            ``view_pixel_values`` (sum of N, 3 * p * p) float32, patches in (channel, row, column) order;
            ``view_grid_hw`` (views, 2); ``views_per_scene`` (scenes,).

        Raises:
            ValueError: There are no views, a picture can't be decoded, is smaller than a patch, or holds NaN or values
                outside its range. The message names the picture.
        """
        scenes = [[self.process_view(image, mode) for image in scene] for scene in as_scenes(images)]
        return self.pack(scenes, return_tensors)

    def process_view(self, image: Image, mode: Mode | None = None) -> PIL.Image.Image:
        """One picture, resized and cropped or padded: RGB, sides multiples of the patch. What a VLM sees as well."""
        picture = to_rgb(image)
        if min(picture.size) < self.patch_size:
            size = f"{picture.width} x {picture.height} (width x height)"
            raise ValueError(
                f"Every picture must be at least one patch, {self.patch_size} x {self.patch_size} pixels, got "
                f"{_describe(picture)} of {size}. Leave it out or enlarge it."
            )
        new_size, (left, top), view_size = self._placement(*picture.size, mode)
        picture = picture.resize(new_size, PIL.Image.Resampling.BICUBIC)
        if view_size != new_size:  # what is cropped lies outside, what is padded stays white
            view = PIL.Image.new("RGB", view_size, "white")
            view.paste(picture, (left, top))
            picture = view
        return picture

    def process_intrinsics(
        self,
        intrinsics: np.ndarray | Tensor,
        image_hw: tuple[int, int],
        mode: Mode | None = None,
    ) -> np.ndarray | Tensor:
        """Intrinsics of pictures of one size -> those of their processed views.

        Args:
            intrinsics: (..., 3, 3), pixels of the original picture.
            image_hw: Height and width of the original picture.
            mode: Overrides the processor's.

        Returns:
            (..., 3, 3), pixels of the processed view, as every model here takes them.
        """
        height, width = image_hw
        (new_width, new_height), (left, top), _ = self._placement(width, height, mode)
        x, y = new_width / width, new_height / height
        change = np.array([[x, 0, left], [0, y, top], [0, 0, 1]])
        return (torch.as_tensor(change).to(intrinsics) if isinstance(intrinsics, Tensor) else change) @ intrinsics

    def _placement(
        self, width: int, height: int, mode: Mode | None
    ) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Size (width, height) after resizing, where its top left corner lies in the view, and the view's size."""
        mode = mode or self.mode
        _check_mode(mode)
        if mode == "pretraining":
            new_height = max(self.size * height // width, self.patch_size)
            cut = new_height % self.patch_size
            return (self.size, new_height), (0, -(cut // 2)), (self.size, new_height - cut)
        scale = self.size / (width if mode == "crop" else max(width, height))
        new_width, new_height = (
            self.size if side * scale == self.size else self._round_to_patch(side, scale) for side in (width, height)
        )
        if mode == "crop":
            top = -(max(new_height - self.size, 0) // 2)
            return (new_width, new_height), (0, top), (new_width, min(new_height, self.size))
        corner = ((self.size - new_width) // 2, (self.size - new_height) // 2)
        return (new_width, new_height), corner, (self.size, self.size)

    def _round_to_patch(self, side: int, scale: float) -> int:
        return max(1, round(side * scale / self.patch_size)) * self.patch_size

    def pack(
        self, scenes: Sequence[Sequence[PIL.Image.Image]], return_tensors: str | TensorType | None = TensorType.PYTORCH
    ) -> ViewBatch:
        """The three inputs of the models from views that :meth:`process_view` made."""
        p = self.patch_size
        mean, std = (np.asarray(values, np.float32) for values in (self.image_mean, self.image_std))
        patches, grids = [], []
        for view in (view for scene in scenes for view in scene):
            pixels = (np.asarray(view, np.float32) / np.float32(255) - mean) / std
            grid = (pixels.shape[0] // p, pixels.shape[1] // p)
            grids.append(grid)
            patches.append(rearrange(pixels, "(h p) (w q) c -> (h w) (c p q)", p=p, q=p))
        data = {
            "view_pixel_values": np.concatenate(patches) if patches else np.zeros((0, 3 * p * p), np.float32),
            "view_grid_hw": np.asarray(grids, np.int64).reshape(-1, 2),
            "views_per_scene": np.asarray([len(scene) for scene in scenes], np.int64),
        }
        return ViewBatch(data, tensor_type=return_tensors)

    def unpack(self, view_pixel_values: Tensor, view_grid_hw: Tensor) -> list[np.ndarray]:
        """The processed views again, to look at: of every view (H, W, 3) uint8."""
        p, views = self.patch_size, []
        grids = [(int(height), int(width)) for height, width in view_grid_hw]
        for patches, (height, width) in zip(view_pixel_values.float().split([h * w for h, w in grids]), grids):
            pixels = rearrange(patches.cpu().numpy(), "(h w) (c p q) -> (h p) (w q) c", h=height, w=width, p=p, q=p)
            pixels = pixels * np.asarray(self.image_std) + np.asarray(self.image_mean)
            views.append((pixels.clip(0, 1) * 255).round().astype(np.uint8))
        return views


def as_scenes(images: Any) -> list[list[Image]]:
    """A picture, a list of pictures or a list of lists of pictures -> a list of scenes, none of them empty."""
    if isinstance(images, Image) and not (isinstance(images, np.ndarray | Tensor) and images.ndim == 4):
        images = [images]
    if not isinstance(images, Iterable):
        raise ValueError(f"`images` must be pictures, or lists of pictures, got {type(images).__name__}.")
    images = list(images)
    nested = {isinstance(image, list | tuple) for image in images}
    if len(nested) == 2:
        raise ValueError(
            "`images` must hold either pictures or lists of pictures, got both. Put every scene's pictures in a list, "
            "a single one too."
        )
    scenes = [list(scene) for scene in images] if nested == {True} else [images]
    for index, scene in enumerate(scenes):
        if not scene:
            raise ValueError(
                f"`images` must hold at least one view for every scene, got none for scene {index}. "
                "Give at least one picture, or leave the scene out."
            )
    return scenes


def to_rgb(image: Image) -> PIL.Image.Image:
    """Any picture as 8-bit RGB: turned upright by its EXIF tag, transparency blended on white, 16 bits scaled to 8.

    Raises:
        ValueError: It can't be decoded, or its values are not a picture's.
    """
    name = _describe(image)
    image = _from_array(image) if isinstance(image, np.ndarray | Tensor) else _decode(image)
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits and more a channel: PIL would clip, not scale
        values = np.asarray(image, np.float32)
        _check_finite(values, image)
        limit = 65535 if values.max(initial=0) > 255 or image.mode.startswith("I;16") else 255
        image = PIL.Image.fromarray((values.clip(0, limit) * (255 / limit)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    picture = image.convert("RGB")
    picture.filename = name  # messages further on can name it
    return picture


def _decode(source: Any) -> PIL.Image.Image:
    """The picture, read to its end."""
    if not isinstance(source, PIL.Image.Image | str | Path):
        raise ValueError(
            f"A picture must be a PIL image, a path, a URL, an array or a tensor, got {type(source).__name__}."
        )
    file = _fetch(source) if str(source).startswith(("http://", "https://")) else source
    try:
        if isinstance(source, PIL.Image.Image):
            source.load()  # it may come from a file that nobody has read yet
            return source
        if str(source).startswith("data:image/"):
            file = BytesIO(base64.b64decode(str(source).partition(",")[2]))
        with PIL.Image.open(file) as image:
            image.load()
            return image
    except FileNotFoundError as error:
        raise ValueError(f"The picture {_describe(source)} doesn't exist. Check the path.") from error
    except (PermissionError, IsADirectoryError) as error:
        raise ValueError(f"The picture {_describe(source)} can't be opened: {error.strerror}. Give a file.") from error
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        cure = "It is damaged or no picture: leave it out or replace it."
        if str(source).lower().endswith((".heic", ".heif")):
            cure = "Register the package pillow-heif with PIL, or export the photo as JPEG."
        raise ValueError(f"The picture can't be decoded: {_describe(source)} ({error}). {cure}") from error


def _fetch(url: str) -> BytesIO:
    try:
        with urlopen(Request(url, headers={"User-Agent": "spa3r"}), timeout=60) as response:
            return BytesIO(response.read())
    except (OSError, ValueError, HTTPException) as error:
        raise ValueError(f"The picture {url} can't be fetched ({error}). Check the address and the network.") from error


def _from_array(array: np.ndarray | Tensor) -> PIL.Image.Image:
    values = array.detach().cpu().float().numpy() if isinstance(array, Tensor) and array.is_floating_point() else array
    values = np.asarray(values)
    if values.ndim == 3 and values.shape[0] in (1, 3, 4) and values.shape[2] not in (1, 3, 4):
        values = values.transpose(1, 2, 0)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim != 2 and not (values.ndim == 3 and values.shape[2] in (3, 4)):
        raise ValueError(
            "A picture given as array or tensor must have shape (H, W), (H, W, 1|3|4) or (1|3|4, H, W), got "
            f"{tuple(array.shape)}."
        )
    if values.dtype == bool:
        values = values * np.uint8(255)
    elif np.issubdtype(values.dtype, np.floating):
        _check_finite(values, array)
        if values.size and (values.min() < -1e-3 or values.max() > 1 + 1e-3):
            raise ValueError(
                f"A floating point picture must hold values in [0, 1], got [{values.min():.4g}, {values.max():.4g}]. "
                "Divide by 255, or pass uint8."
            )
        values = (values.clip(0, 1) * 255).round()
    elif not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"A picture given as array must hold integers or floats, got {values.dtype}.")
    elif values.dtype != np.uint8 and values.size:
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"An integer picture must hold values in [0, 65535], got [{values.min()}, {values.max()}]. Pass uint8."
            )
        values = np.round(values * (255 / (65535 if values.dtype == np.uint16 or values.max() > 255 else 255)))
    return PIL.Image.fromarray(values.astype(np.uint8))


def _check_finite(values: np.ndarray, image: Image) -> None:
    if not np.isfinite(values).all():
        raise ValueError(
            f"A picture must hold finite values, got {_describe(image)} with NaN or infinite pixels. "
            "Find out where they come from; no picture file has them."
        )


def _check_mode(mode: str) -> None:
    if not isinstance(mode, str) or mode not in get_args(Mode):
        raise ValueError(f"`mode` must be 'crop', 'pad' or 'pretraining', got {shorten(mode)}.")


def _describe(image: Image) -> str:
    if isinstance(image, str | Path):
        return str(image) if len(str(image)) <= 200 else f"{str(image)[:40]}..."
    if isinstance(image, np.ndarray | Tensor):
        return f"an array of shape {tuple(image.shape)}"
    return getattr(image, "filename", "") or "a PIL image"


__all__ = ["Spa3RImageProcessor"]
