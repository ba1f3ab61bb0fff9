"""Pictures and videos for the tests, made on the spot."""

import base64
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO
from pathlib import Path

import av
import numpy as np
from PIL import Image

GRAY_FIRST, GRAY_STEP = 16, 6
"""Frame i of a counting video is gray, of level ``GRAY_FIRST + i * GRAY_STEP``: up to 38 frames."""


def noise(width: int, height: int, seed: int = 0, channels: int = 3) -> Image.Image:
    """Noise of a given size: L, LA, RGB or RGBA by the number of channels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def smooth(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards, so every turn and crop shows."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green, np.full_like(red, 90)], -1).round().astype(np.uint8))


def encoded(picture: Image.Image, kind: str = "PNG", **kwargs) -> bytes:
    """The picture as the bytes of a file."""
    buffer = BytesIO()
    picture.save(buffer, kind, **kwargs)
    return buffer.getvalue()


def data_url(picture: Image.Image) -> str:
    """The picture as a PNG in a URL."""
    return "data:image/png;base64," + base64.b64encode(encoded(picture)).decode()


def counting_frames(count: int, width: int = 64, height: int = 48) -> list[Image.Image]:
    """Frames that say their number in their gray level."""
    return [Image.new("RGB", (width, height), (GRAY_FIRST + i * GRAY_STEP,) * 3) for i in range(count)]


def read_number(frame: Image.Image) -> int:
    """The number that :func:`counting_frames` painted."""
    number = (np.asarray(frame.convert("L"), np.float64).mean() - GRAY_FIRST) / GRAY_STEP
    assert abs(number - round(number)) < 0.45, f"gray level between two numbers: {number:.2f}"
    return round(number)


def write_video(
    path: Path,
    frames: Sequence[Image.Image],
    fps: int = 2,
    codec: str = "mpeg4",
    options: dict | None = None,
    gop_size: int | None = None,
    codec_options: dict | None = None,
) -> Path:
    """Write frames as a video, a key frame at least every `gop_size`; the container follows from the name."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=codec_options or {})
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        if gop_size is not None:
            stream.gop_size = gop_size
            stream.options = stream.options | {"sc_threshold": "0"}  # a change of the picture makes no key frame
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode(None))
    return path


def counting_video(path: Path, count: int, fps: int = 2, **kwargs) -> Path:
    """A video whose frames say their number."""
    return write_video(path, counting_frames(count), fps, **kwargs)


def write_sound(path: Path) -> Path:
    """A file with an audio stream only."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def turn_mp4(path: Path, degrees: int) -> Path:
    """Say in an MP4's track header that players shall turn it clockwise, as phones do."""
    a, b, c, d = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    one = 1 << 16
    matrix = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 44  # version 0: the matrix comes after 40 bytes of fields
    assert struct.unpack(">9i", content[start : start + 36]) == (one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    content[start : start + 36] = matrix
    path.write_bytes(content)
    return path


def lie_about_length(path: Path, count: int) -> Path:
    """Write a number of frames into an AVI's headers."""
    content = bytearray(path.read_bytes())
    for chunk, offset in ((b"avih", 8 + 16), (b"strh", 8 + 32)):
        start = content.index(chunk) + offset
        content[start : start + 4] = struct.pack("<I", count)
    path.write_bytes(content)
    return path


def user(*parts: str | Image.Image) -> list[dict]:
    """A conversation of one user's message: words and pictures in order."""
    kinds = [("text" if isinstance(part, str) else "image", part) for part in parts]
    return [{"role": "user", "content": [{"type": kind, kind: part} for kind, part in kinds]}]


def asked(question: str, answer: str = "4.") -> list[dict]:
    """A question and its answer, as rows of instruction data have them."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@contextmanager
def served(files: dict[str, bytes]) -> Iterator[str]:
    """Files by path on a web server of this machine; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            content = files.get(self.path)
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
