"""Photos -> packed views: any pictures, any number of views per scene, any sizes in a batch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, get_args

import numpy as np
import PIL.Image
import torch
from einops import rearrange
from PIL.Image import Resampling
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import TensorType

from spa3r.checkpoints import resolve
from spa3r.checks import check_channels, check_count, is_count, shorten
from spa3r.media.files import describe
from spa3r.media.images import Image, as_scenes, to_rgb
from spa3r.media.resampling import FILTERS, resize_rows
from spa3r.models.released import WHERE, Kind, find_released, view_size

Mode = Literal["crop", "pad", "pretraining"]
"""How a picture is converted to a view, see :class:`Spa3RImageProcessor`."""

MAX_SIZE = 16384
"""Maximum side of a view in pixels."""

MAX_VIEW_PIXELS = 2**24
"""Maximum pixels of a view, unless `size` squared is larger; only pictures much taller than wide exceed it."""

DEFAULTS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": int(Resampling.BICUBIC)}
"""Settings that are saved only if they differ from these defaults."""

LAYOUT_KEYS = ("view_grid_hw", "views_per_scene", "image_tokens_per_scene", "spatial_tokens_per_scene")


class ViewBatch(BatchFeature):
    """A BatchFeature whose ``.to(device)`` keeps the layout (``view_grid_hw``, ``views_per_scene``,
    ``image_tokens_per_scene``) on the CPU: the models read it as Python integers, which would synchronize with an
    accelerator."""

    def to(self, *args: Any, **kwargs: Any) -> ViewBatch:
        layout = {key: self.data[key] for key in LAYOUT_KEYS if key in self.data}
        super().to(*args, **kwargs)
        self.data.update(layout)
        return self


class Spa3RImageProcessor(BaseImageProcessor):
    """Resizes views as in VGGT's training, and packs the patches of all views of all scenes into one sequence.

    Args:
        size: Width (crop, pretraining) or longest side (pad) of a processed view in pixels, a multiple of `patch_size`.
        patch_size: Side of a patch in pixels.
        mode: ``"crop"``: resizes the width to `size` and the height in proportion, rounded to a multiple of the patch,
            and center-crops the height to `size` if it is larger. ``"pad"``: resizes the longest side to `size` and
            pads to a square with white. ``"pretraining"``: resizes the width to `size` and the height in exact
            proportion, and center-crops the height to a multiple of the patch, without a limit; as in Spa3R's
            pretraining.
        image_mean: Mean for normalization, per channel.
        image_std: Standard deviation for normalization, per channel; above 0.
        do_resize: Whether to resize, crop and pad. False: pictures are used as they are; their sides must be multiples
            of `patch_size`.
        do_rescale: Whether to rescale pixels to [0, 1]. False: they stay in [0, 255]; requires ``do_normalize=False``.
        do_normalize: Whether to subtract `image_mean` and divide by `image_std`.
        resample: Resizing filter: bicubic, as in training, bilinear or Lanczos, as a ``PIL.Image.Resampling`` or its
            number.

    Raises:
        ValueError: A value has the wrong type or is out of range, or two contradict each other.
    """

    model_input_names = ["view_pixel_values", "view_grid_hw", "views_per_scene"]

    def __init__(
        self,
        size: int = 518,
        patch_size: int = 14,
        mode: Mode = "crop",
        image_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        image_std: Sequence[float] = IMAGENET_DEFAULT_STD,
        do_resize: bool = True,
        do_rescale: bool = True,
        do_normalize: bool = True,
        resample: Resampling | int = Resampling.BICUBIC,
        **kwargs: Any,
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
        self.do_resize, self.do_rescale, self.do_normalize = do_resize, do_rescale, do_normalize
        for name in ("do_resize", "do_rescale", "do_normalize"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False, got {shorten(getattr(self, name))}.")
        if do_normalize and not do_rescale:
            raise ValueError(
                "`do_rescale=False` must come with `do_normalize=False`, got True: `image_mean` and `image_std` are of "
                "pixels in [0, 1]. Floating point pictures in [0, 1] need neither: they are never divided twice."
            )
        if not is_count(resample) or resample not in FILTERS:
            names = ", ".join(f"{filter.name} ({int(filter)})" for filter in FILTERS)
            raise ValueError(f"`resample` must be one of PIL.Image.Resampling's {names}, got {shorten(resample)}.")
        self.resample = int(resample)

    @classmethod
    def from_pretrained(  # ty: ignore[incompatible-method-override]  # options are given by name
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> Self:
        """Like transformers' ``from_pretrained``; ``"embedded"`` names the checkpoint in the package.

        A checkpoint in the layout of the research code has no settings file: settings are derived from its tensors.
        """
        source = resolve(pretrained_model_name_or_path)
        where = {key: kwargs[key] for key in WHERE if key in kwargs}
        if (released := find_released(source, get_args(Kind), cls.__name__, **where)) is not None:
            size, patch_size = view_size(released.tensors())
            settings: dict[str, Any] = {"size": size, "patch_size": patch_size}
            settings |= {key: kwargs[key] for key in kwargs if key not in WHERE and not key.startswith("_from")}
            return cls(**settings)
        return super().from_pretrained(source, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The settings. Those of :data:`DEFAULTS` are included only if they differ, as older files don't have them."""
        return {key: value for key, value in super().to_dict().items() if key not in DEFAULTS or DEFAULTS[key] != value}

    def preprocess(
        self,
        images: Image | Sequence[Image] | Sequence[Sequence[Image]],
        return_tensors: str | TensorType | None = TensorType.PYTORCH,
        mode: Mode | None = None,
        *,
        size: int | Mapping[str, int] | None = None,
        do_resize: bool | None = None,
        do_rescale: bool | None = None,
        do_normalize: bool | None = None,
        resample: Resampling | int | None = None,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> ViewBatch:
        """
        Args:
            images: A list of scenes, each a list of pictures; or the pictures of one scene; or one picture. A 4-D array
                is a list of pictures.
            return_tensors: ``"pt"``, ``"np"``, or None for lists of arrays.
            mode: Overrides the processor's setting, as do all of the following.
            size: A number, or transformers' ``{"height": n, "width": n}``.
            do_resize: Overrides the processor's setting.
            do_rescale: Overrides the processor's setting.
            do_normalize: Overrides the processor's setting.
            resample: Overrides the processor's setting.
            image_mean: Overrides the processor's setting.
            image_std: Overrides the processor's setting.

        Returns:
            ``view_pixel_values`` (sum of N, 3 * p * p) float32, patches in (channel, row, column) order;
            ``view_grid_hw`` (views, 2); ``views_per_scene`` (scenes,).

        Raises:
            ValueError: There are no views, a picture can't be decoded, is smaller than a patch, contains NaN or values
                outside its range, or is incompatible with the arguments. The message names the picture.
        """
        processor = self._with(
            mode=mode,
            size=size,
            do_resize=do_resize,
            do_rescale=do_rescale,
            do_normalize=do_normalize,
            resample=resample,
            image_mean=image_mean,
            image_std=image_std,
        )
        scenes = [[processor.process_view(image) for image in scene] for scene in as_scenes(images)]
        return processor.pack(scenes, return_tensors)

    def _with(self, **settings: Any) -> Spa3RImageProcessor:
        """A copy with these settings (None keeps the current value), validated by the constructor."""
        settings = {key: value for key, value in settings.items() if value is not None}
        if not settings:
            return self
        if isinstance(size := settings.get("size"), Mapping):
            sides = {size.get("height"), size.get("width")}
            if len(sides) > 1 or set(size) != {"height", "width"}:
                raise ValueError(
                    f"`size` must be a number, or {{'height': n, 'width': n}} of one number, got {dict(size)}. What "
                    "`mode` determines the result for other shapes."
                )
            settings["size"] = sides.pop()
        own = ("size", "patch_size", "mode", "image_mean", "image_std", *DEFAULTS)
        return type(self)(**{name: getattr(self, name) for name in own} | settings)

    def process_view(self, image: Image, mode: Mode | None = None) -> PIL.Image.Image:
        """Resize and crop or pad one picture: RGB, sides multiples of the patch. Also used for the VLM's pictures."""
        picture = to_rgb(image)
        described = f"{describe(picture)} of {picture.width} x {picture.height} (width x height)"
        if min(picture.size) < self.patch_size:
            raise ValueError(
                f"Every picture must be at least one patch, {self.patch_size} x {self.patch_size} pixels, got "
                f"{described}. Leave it out or enlarge it."
            )
        if not self.do_resize:
            if picture.width % self.patch_size or picture.height % self.patch_size:
                raise ValueError(
                    f"With `do_resize=False` every picture's sides must be multiples of the patch, {self.patch_size} "
                    f"pixels, got {described}. Crop it, or leave `do_resize` out."
                )
            return picture
        (width, height), (left, top), view_size = self._placement(*picture.size, mode)
        most = max(MAX_VIEW_PIXELS, self.size**2)
        if view_size[0] * view_size[1] > most:
            raise ValueError(
                f"A view must have at most {most} pixels, got {view_size[0]} x {view_size[1]} of {described}. "
                "Cut the picture, or use `mode` 'crop', which takes its middle."
            )
        first, rows = max(-top, 0), min(height, view_size[1])  # cropped rows are not computed
        picture = resize_rows(picture, (width, height), first, rows, Resampling(self.resample))
        if view_size != picture.size:  # pad with white
            view = PIL.Image.new("RGB", view_size, "white")
            view.paste(picture, (left, top + first))
            picture = view
        return picture

    def process_intrinsics(
        self,
        intrinsics: np.ndarray | Tensor,
        image_hw: tuple[int, int],
        mode: Mode | None = None,
    ) -> np.ndarray | Tensor:
        """Convert intrinsics of pictures of one size to those of their processed views.

        Args:
            intrinsics: (..., 3, 3), pixels of the original picture.
            image_hw: Height and width of the original picture.
            mode: Overrides the processor's.

        Returns:
            (..., 3, 3), pixels of the processed view, as the models take them.
        """
        if not self.do_resize:
            return intrinsics
        height, width = image_hw
        (new_width, new_height), (left, top), _ = self._placement(width, height, mode)
        x, y = new_width / width, new_height / height
        change = np.array([[x, 0, left], [0, y, top], [0, 0, 1]])
        return (torch.as_tensor(change).to(intrinsics) if isinstance(intrinsics, Tensor) else change) @ intrinsics

    def _placement(
        self, width: int, height: int, mode: Mode | None
    ) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Size (width, height) after resizing, position of its top left corner in the view, and the view's size."""
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
        """Pack views from :meth:`process_view` into the three inputs of the models."""
        p = self.patch_size
        mean, std = (np.asarray(values, np.float32) for values in (self.image_mean, self.image_std))
        if not self.do_normalize:
            mean, std = np.float32(0), np.float32(1)
        scale = np.float32(255 if self.do_rescale else 1)
        # Pixels have 256 levels: a table of normalized ones is faster than arithmetic with every pixel.
        table = ((np.arange(256, dtype=np.float32)[:, None].repeat(3, axis=1) / scale - mean) / std).T.copy()
        views = [view for scene in scenes for view in scene]
        grids = [(view.height // p, view.width // p) for view in views]
        patches = np.empty((sum(height * width for height, width in grids), 3, p * p), np.float32)
        start = 0
        for view, (height, width) in zip(views, grids):
            levels = rearrange(np.asarray(view), "(h p) (w q) c -> (h w) c (p q)", p=p, q=p)
            for channel in range(3):  # "clip" writes without a buffer
                own = patches[start : start + height * width, channel]
                np.take(table[channel], levels[:, channel], out=own, mode="clip")
            start += height * width
        data = {
            "view_pixel_values": patches.reshape(len(patches), 3 * p * p),
            "view_grid_hw": np.asarray(grids, np.int64).reshape(-1, 2),
            "views_per_scene": np.asarray([len(scene) for scene in scenes], np.int64),
        }
        return ViewBatch(data, tensor_type=return_tensors)

    def unpack(self, view_pixel_values: Tensor, view_grid_hw: Tensor) -> list[np.ndarray]:
        """Convert packed views back to pictures for display: a (H, W, 3) uint8 array for every view."""
        p, views = self.patch_size, []
        grids = [(int(height), int(width)) for height, width in view_grid_hw]
        for patches, (height, width) in zip(view_pixel_values.float().split([h * w for h, w in grids]), grids):
            pixels = rearrange(patches.cpu().numpy(), "(h w) (c p q) -> (h p) (w q) c", h=height, w=width, p=p, q=p)
            if self.do_normalize:
                pixels = pixels * np.asarray(self.image_std) + np.asarray(self.image_mean)
            views.append((pixels * (255 if self.do_rescale else 1)).clip(0, 255).round().astype(np.uint8))
        return views


def _check_mode(mode: str) -> None:
    if not isinstance(mode, str) or mode not in get_args(Mode):
        raise ValueError(f"`mode` must be 'crop', 'pad' or 'pretraining', got {shorten(mode)}.")


__all__ = ["Spa3RImageProcessor"]
