"""Pictures from the content of requests: data URLs, uploaded files, and remote ones if the operator allows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import PIL.Image

from spa3r.console import Limits
from spa3r.media.files import VIDEOS, is_url, shortened
from spa3r.media.images import data_url_bytes, to_rgb
from spa3r.media.videos import sample_frames
from spa3r.serving.downloads import download
from spa3r.serving.errors import ApiError
from spa3r.serving.requests import ImagePart, VideoPart

REMOTE_SECONDS = 30.0
"""Maximum time of a download."""


@dataclass(frozen=True)
class Upload:
    """A file of a request.

    Attributes:
        name: Its name for messages.
        content: Its bytes.
        num_frames: Number of frames of a video; None: by its length.
        is_video: Whether it is a video.
    """

    name: str
    content: bytes
    num_frames: int | None
    is_video: bool


def is_video(name: str, content_type: str | None) -> bool:
    """Whether an uploaded file is a video, by its name or its declared type."""
    return PurePath(name).suffix.lower() in VIDEOS or (content_type or "").startswith("video/")


class PictureReader:
    """Reads the pictures of requests within limits; blocks, so it runs in a thread.

    Args:
        limits: Limits on the pictures of a scene.
        allow_remote: Whether http(s) URLs are downloaded.
        keep: Function that reduces each picture, so that large ones don't add up; None: keep pictures whole.
    """

    def __init__(
        self,
        limits: Limits,
        allow_remote: bool = False,
        keep: Callable[[PIL.Image.Image], PIL.Image.Image] | None = None,
    ):
        self.limits, self.allow_remote, self.keep = limits, allow_remote, keep

    def parts(self, parts: Sequence[ImagePart | VideoPart], param: str) -> list[list[PIL.Image.Image]]:
        """The pictures of each content part.

        Args:
            parts: Pictures and videos of one scene.
            param: The parameter of the request that holds them, for errors.

        Raises:
            ApiError: One can't be read, or is not allowed, or there are too many.
        """
        self._check_count([(isinstance(part, VideoPart), _frames(part)) for part in parts], param)
        uploads = []
        for index, part in enumerate(parts):
            kind = "video" if isinstance(part, VideoPart) else "picture"
            url = part.video_url.url if isinstance(part, VideoPart) else part.image_url.url
            name = f"{kind} {index + 1} of the request"
            uploads.append(Upload(name, self._content(url, name, param), _frames(part), isinstance(part, VideoPart)))
        return self.files(uploads, param)

    def files(self, uploads: Sequence[Upload], param: str) -> list[list[PIL.Image.Image]]:
        """The pictures of each file; see :meth:`parts`."""
        self._check_count([(upload.is_video, upload.num_frames) for upload in uploads], param)
        views: list[list[PIL.Image.Image]] = []
        for upload in uploads:
            try:
                if upload.is_video:
                    pictures = sample_frames(upload.content, upload.num_frames)
                else:
                    pictures = [to_rgb(upload.content, self.limits.pixels)]
            except ValueError as error:
                text = str(error).replace(f"{len(upload.content)} bytes", upload.name)
                raise ApiError(400, text, f"invalid_{'video' if upload.is_video else 'image'}", param) from error
            for picture in pictures:
                picture.filename = upload.name  # ty: ignore[missing-attribute]  # for later errors
            views.append(pictures if self.keep is None else [self.keep(picture) for picture in pictures])
            self._check_count([(False, None)] * sum(map(len, views)), param)
        return views

    def _check_count(self, items: Sequence[tuple[bool, int | None]], param: str) -> None:
        try:
            self.limits.check_views(sum((frames or 1) if is_video else 1 for is_video, frames in items))
        except ValueError as error:
            raise ApiError(400, str(error), "too_many_pictures", param) from error

    def _content(self, url: str, name: str, param: str) -> bytes:
        try:
            if url[:5].lower() == "data:":
                return data_url_bytes(url)
            if is_url(url) and self.allow_remote:
                return download(url, self.limits.file_bytes, REMOTE_SECONDS)
        except ValueError as error:
            raise ApiError(400, str(error), "invalid_url", param) from error
        allowed = "a data URL, such as 'data:image/jpeg;base64,...'"
        if self.allow_remote:
            allowed += ", or an http(s) URL"
        cure = "Send its content"
        if is_url(url):
            cure += ", or ask the operator of the server for `--allow-remote`"
        raise ApiError(
            400,
            f"The URL of {name} must be {allowed}, got {shortened(url, 80)!r}. The server reads none of its own files. "
            f"{cure}.",
            "invalid_url",
            param,
        )


def _frames(part: ImagePart | VideoPart) -> int | None:
    return part.video_url.num_frames if isinstance(part, VideoPart) else None
