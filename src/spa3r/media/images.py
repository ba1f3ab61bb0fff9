"""Converts pictures (files, URLs, bytes, text, arrays, PIL images) to 8-bit RGB; errors name the picture."""

from __future__ import annotations

import base64
import binascii
import math
import os
import re
import string
import struct
from collections.abc import Callable, Iterable
from functools import cache
from http.client import HTTPException
from io import BytesIO, IOBase
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, unquote_to_bytes, urlsplit, urlunsplit
from urllib.request import Request, urlopen

import numpy as np
import PIL.Image
import PIL.ImageFile
import PIL.ImageOps
import torch
from torch import Tensor

from spa3r.media.files import HEIF, can_read_heif, describe, exists, regular_file, shortened

Image = PIL.Image.Image | str | Path | bytes | bytearray | memoryview | IOBase | np.ndarray | Tensor
"""A PIL image; a path, ``file:``, ``http(s):`` or ``data:`` URL, or base64; the bytes of a file, or a file open for
reading them; or an array or tensor: (H, W), (H, W, 1|3|4) or (1|3|4, H, W), also in a batch of one; uint8 in [0, 255],
floating point in [0, 1], or 16-bit in [0, 65535]."""

MAX_PIXELS = int(os.environ.get("SPA3R_MAX_IMAGE_PIXELS", 2**28))
"""Maximum pixels of a decoded picture; the environment variable ``SPA3R_MAX_IMAGE_PIXELS`` changes the limit."""

MAX_DOWNLOADED_BYTES = 2**29
"""Maximum size in bytes of a downloaded picture."""

_PILS_OWN_LIMIT = 1024 * 1024 * 1024 // 4 // 3  # the default of PIL.Image.MAX_IMAGE_PIXELS
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]{16,}+={0,2}+\s*+")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def to_rgb(image: Image, max_pixels: int | None = None) -> PIL.Image.Image:
    """Convert any picture to 8-bit RGB: apply EXIF rotation, blend transparency on white, scale 16 bits to 8.

    Args:
        image: A picture in any supported form.
        max_pixels: Maximum pixels of a decoded file; None: :data:`MAX_PIXELS`.

    Raises:
        ValueError: The picture can't be read or decoded, has too many pixels, or has invalid values.
    """
    name = describe(image)
    if isinstance(image, np.ndarray | Tensor):
        _check_array(image, MAX_PIXELS if max_pixels is None else max_pixels)
        picture = _blended(_from_array(image))
    else:
        try:
            decoded = _decoded(image, name, MAX_PIXELS if max_pixels is None else max_pixels)
            picture = _blended(_to_8_bits(decoded, name))
        except _PictureError as error:
            raise ValueError(str(error)) from error
        except MemoryError as error:
            raise ValueError(f"The picture {name} needs more memory than there is. Make it smaller.") from error
        except Exception as error:  # decoders raise many types: RuntimeError, struct.error, zlib.error, ...
            raise ValueError(
                f"The picture can't be decoded: {name} ({_words(error)}). {_cure(image, error)}"
            ) from error
    picture.filename = name  # ty: ignore[missing-attribute]  # as PIL's pictures of files have it
    return picture


def as_scenes(images: Any) -> list[list[Image]]:
    """Convert a picture, a list of pictures or a list of lists of pictures to a list of nonempty scenes.

    A 4-D array is a list of pictures, a 5-D one a list of scenes.
    """
    if (isinstance(images, Image) or hasattr(images, "read")) and not is_batch(images):
        images = [images]
    if not isinstance(images, Iterable):
        raise ValueError(f"`images` must be pictures, or lists of pictures, got {type(images).__name__}.")
    images = list(images)
    nested = {isinstance(image, list | tuple) or is_batch(image) for image in images}
    if len(nested) == 2:
        raise ValueError(
            "`images` must hold either pictures or lists of pictures, got both. Put every scene's pictures in a list, "
            "a single one too."
        )
    scenes = [flattened(scene) for scene in images] if nested == {True} else [images]
    for index, scene in enumerate(scenes):
        if not scene:
            raise ValueError(
                f"`images` must hold at least one picture for every scene, got none for scene {index}. "
                "Give at least one picture, or leave the scene out."
            )
    return scenes


def is_batch(image: Any) -> bool:
    """Whether it is an array of several pictures."""
    return isinstance(image, np.ndarray | Tensor) and image.ndim >= 4


def flattened(pictures: Iterable[Any]) -> list[Image]:
    """Pictures as a flat list; 4-D arrays are split into pictures."""
    found: list[Image] = []
    for picture in pictures:
        found += list(picture) if is_batch(picture) else [picture]
    return found


class _PictureError(ValueError):
    """An error whose message is already complete."""


def _decoded(source: Any, name: str, max_pixels: int) -> PIL.Image.Image:
    """The decoded and upright picture; the caller's image is not changed."""
    _register_heif()
    if isinstance(source, PIL.Image.Image):
        if isinstance(source, PIL.ImageFile.ImageFile):  # it may not be loaded from its file yet
            _check_pixels(source, name, max_pixels)
        return PIL.ImageOps.exif_transpose(source)
    with _opened(_file(source)) as image:
        _check_pixels(image, name, max_pixels)
        PIL.ImageOps.exif_transpose(image, in_place=True)
        return image


def _file(source: Any) -> Path | IO[bytes]:
    """Something that PIL can open."""
    if isinstance(source, bytes | bytearray | memoryview):
        return BytesIO(source)
    if hasattr(source, "read") and not isinstance(source, str | Path):
        return source
    if not isinstance(source, str | Path):
        raise _PictureError(
            "A picture must be a PIL image, a path, a URL, base64, bytes, an array or a tensor, got "
            f"{type(source).__name__}."
        )
    if not is_path(source):
        if source[:5].lower() == "data:":
            return BytesIO(data_url_bytes(source))
        if source[:4].lower() == "http":
            return _downloaded(source)
        return BytesIO(_of_base64(source))
    try:
        return regular_file(source)
    except ValueError as error:
        raise _PictureError(str(error)) from error


def is_path(source: str | Path) -> bool:
    """Whether a text is a file name, and neither a network URL nor base64 data."""
    if isinstance(source, Path):
        return True
    if source[:8].lower().startswith(("http://", "https://", "data:")):
        return False
    return not _BASE64.fullmatch(source) or exists(source) or not _is_picture(_of_base64(source[:64]))


def data_url_bytes(url: str) -> bytes:
    """The content of a ``data:`` URL, in base64 or percent-encoded.

    Raises:
        ValueError: The URL has no comma.
    """
    head, comma, payload = url.partition(",")
    if not comma:
        raise _PictureError(
            f"A data URL must be 'data:image/...;base64,' and the picture, got {shortened(url)}, which has no comma."
        )
    content = unquote_to_bytes(payload)
    return _of_base64(content.decode("latin-1")) if head.lower().rstrip().endswith(";base64") else content


def _of_base64(text: str) -> bytes:
    """Decode base64 of either alphabet, with or without padding and line breaks; truncated data is decoded partly."""
    text = re.sub(r"[\s=]", "", text).translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error:
        return base64.b64decode(text[: len(text) // 4 * 4])


def _is_picture(content: bytes) -> bool:
    """Whether bytes start with the signature of a picture format."""
    if _is_heif(content):
        return True
    PIL.Image.init()
    return any(accept is not None and _accepts(accept, content[:16]) for _, accept in PIL.Image.OPEN.values())


def _accepts(accept: Callable[[bytes], bool | str] | None, start: bytes) -> bool:
    """Whether one of PIL's formats accepts the first bytes of a file."""
    try:
        return accept is None or accept(start) is True
    except (struct.error, IndexError):  # too short
        return False


def _is_heif(content: bytes) -> bool:
    return content[4:8] == b"ftyp" and content[8:12] in _HEIF_BRANDS


@cache
def _register_heif() -> None:
    """Register HEIC with PIL if pillow-heif is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return
    register_heif_opener()


def _opened(file: Path | IO[bytes]) -> PIL.Image.Image:
    """Open a picture, reading only its header. PIL's default limit is below the largest pictures of today's phones, so
    ours replaces it unless the user has changed PIL's."""
    try:
        return PIL.Image.open(file)
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        if PIL.Image.MAX_IMAGE_PIXELS != _PILS_OWN_LIMIT:
            raise
    content = BytesIO(file.read_bytes()) if isinstance(file, Path) else file
    content.seek(0)
    start = content.read(16)
    for factory, accept in list(PIL.Image.OPEN.values()):
        if _accepts(accept, start):
            content.seek(0)
            try:
                return factory(content, "")
            except (SyntaxError, IndexError, TypeError, struct.error):  # another format; PIL.Image.open skips these too
                continue
    raise PIL.UnidentifiedImageError("cannot identify image file")


def _check_array(array: np.ndarray | Tensor, max_pixels: int) -> None:
    """Raise for an array that has no pixels, or too many."""
    if isinstance(array, Tensor) and (array.is_meta or array.layout != torch.strided or array.is_quantized):
        raise ValueError(
            f"A picture given as tensor must hold its pixels one by one, got one of {array.dtype} and {array.layout} "
            f"on {array.device}. Pass tensor.to_dense(), or load it onto a device that holds data."
        )
    size = math.prod(array.shape)
    if array.ndim and not size:
        raise ValueError(f"A picture must have at least one pixel, got {describe(array)}. Leave it out.")
    if size > 4 * max_pixels:  # channels
        raise ValueError(
            f"A picture must have at most {max_pixels} pixels, got {describe(array)}. Make it smaller, or raise the "
            "limit: the environment variable SPA3R_MAX_IMAGE_PIXELS."
        )


def _check_pixels(image: PIL.Image.Image, name: str, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise _PictureError(
            f"A picture must have at most {max_pixels} pixels, got {name} of {image.width} x {image.height} (width x "
            f"height), {image.width * image.height}. Make it smaller, or raise the limit: the environment variable "
            "SPA3R_MAX_IMAGE_PIXELS."
        )


def _downloaded(url: str) -> BytesIO:
    try:
        with urlopen(Request(_quoted(url), headers={"User-Agent": "spa3r"}), timeout=60) as response:
            content = response.read(MAX_DOWNLOADED_BYTES + 1)
    except (OSError, ValueError, HTTPException) as error:
        raise _PictureError(
            f"The picture {describe(url)} can't be downloaded ({_words(error)}). Check the address and the network."
        ) from error
    if len(content) > MAX_DOWNLOADED_BYTES:
        raise _PictureError(f"The picture {describe(url)} has more than {MAX_DOWNLOADED_BYTES} bytes. Make it smaller.")
    return BytesIO(content)


def _quoted(url: str) -> str:
    """The URL for a request: spaces, non-ASCII letters and lone percent signs are encoded, the rest is unchanged."""
    parts = urlsplit(url.strip())
    netloc = parts.netloc
    if not netloc.isascii():
        user, at, host = netloc.rpartition("@")
        netloc = user + at + host.encode("idna").decode("ascii")
    path, query = (
        quote(re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", part), safe=string.punctuation)
        for part in (parts.path, parts.query)
    )
    return urlunsplit((parts.scheme, netloc, path, query, ""))


def _words(error: Exception) -> str:
    """A library's message without memory addresses and payloads."""
    text = re.sub(r" ?<[^>]* object at 0x[^>]*>", "", str(error)) or type(error).__name__
    return shortened(text, 300)


def _cure(source: Any, error: Exception) -> str:
    if isinstance(error, PIL.Image.DecompressionBombError | PIL.Image.DecompressionBombWarning):
        return "Raise PIL.Image.MAX_IMAGE_PIXELS if the picture can be trusted."
    if not can_read_heif() and _seems_heif(source):
        return 'It seems to be a HEIC picture: pip install "spa3r[heic]", or export the photo as JPEG.'
    return "It is damaged or not a picture: leave it out or replace it."


def _seems_heif(source: Any) -> bool:
    if isinstance(source, str | Path) and str(source).lower().endswith(HEIF):
        return True
    try:
        file = _file(source)
        if isinstance(file, Path):
            with file.open("rb") as opened:
                return _is_heif(opened.read(16))
        file.seek(0)
        return _is_heif(file.read(16))
    except (ValueError, OSError):
        return False


def _to_8_bits(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """Scale a picture with 16 or more bits per channel, which PIL would clip."""
    if not image.mode.startswith("I") and image.mode != "F":
        return image
    values = np.asarray(image)
    if image.mode == "F":
        _check_finite(values, name)
        if values.size and -1e-3 <= values.min() and values.max() <= 1 + 1e-3:
            return _from_array(values)
        if values.max(initial=0) < 16 and (values != values.round()).any():  # neither [0, 1] nor [0, 255]
            raise _PictureError(
                f"A floating point picture must hold values in [0, 1], or in [0, 255] or [0, 65535], got {name} with "
                f"values in [{values.min():.4g}, {values.max():.4g}]. Scale it to [0, 1], or save it with 8 bits."
            )
        values = values.round().astype(np.int64)
    try:
        return _from_array(values)
    except ValueError as error:
        raise _PictureError(f"{error} ({name})") from error


def _blended(image: PIL.Image.Image) -> PIL.Image.Image:
    """Convert to RGB, blending transparency on white."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _from_array(array: np.ndarray | Tensor) -> PIL.Image.Image:
    values = array.detach().cpu().float().numpy() if isinstance(array, Tensor) and array.is_floating_point() else array
    values = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    if values.ndim == 4 and len(values) == 1:  # a batch of one
        values = values[0]
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
        _check_finite(values, describe(array))
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
        is_16_bits = values.dtype.kind == "u" and values.dtype.itemsize == 2  # of either byte order
        values = np.round(values * (255 / (65535 if is_16_bits or values.max() > 255 else 255)))
    return PIL.Image.fromarray(values.astype(np.uint8))


def _check_finite(values: np.ndarray, name: str) -> None:
    if not np.isfinite(values).all():
        raise _PictureError(
            f"A picture must hold finite values, got {name} with NaN or infinite pixels. "
            "Find out where they come from; no picture file has them."
        )
