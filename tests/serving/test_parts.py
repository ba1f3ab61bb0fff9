"""Parts of the server by themselves: growing texts, downloads."""

import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from media import encoded, noise

from spa3r.console import Limits
from spa3r.serving.downloads import download, is_public
from spa3r.serving.errors import ApiError
from spa3r.serving.pictures import PictureReader
from spa3r.serving.requests import ImagePart
from spa3r.serving.text import GrowingText

# Growing texts --------------------------------------------------------------------------------------------------------


def grown(content: bytes, stop=()) -> tuple[list[str], bool]:
    """What is sent of a text whose tokens are bytes, and whether a stop text came."""
    text = GrowingText(lambda tokens: bytes(tokens).decode(errors="replace"), stop)
    sent = []
    for end in range(1, len(content) + 1):
        sent.append(text.next(list(content[:end]), end == len(content)))
        if text.is_stopped:
            break
    return sent, text.is_stopped


@pytest.mark.parametrize("words", ("A lamp.", "  It is\n\n 3 m away. \n", "Größe: 中文 🙂", " ", "\ufffd"))
def test_pieces_joined_are_the_answer(words):
    sent, _ = grown(words.encode())
    assert "".join(sent) == words.strip()
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in sent[:-1])


@pytest.mark.parametrize(
    ("stop", "wanted"),
    [
        (["STOP"], "one two"),
        (["two", "one t"], ""),
        (["STOPS"], "one two STOP three"),
        (["o three"], "one two STOP three"),
    ],
)
def test_a_stop_text_is_never_sent_even_in_part(stop, wanted):
    sent, is_stopped = grown(b"one two STOP three", stop)
    assert "".join(sent) == wanted and is_stopped == (wanted != "one two STOP three")


# Downloads ------------------------------------------------------------------------------------------------------------


@contextmanager
def answering(reply, address: str = "127.0.0.1"):
    """A server whose answers `reply(handler)` writes: its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            reply(self)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer((address, 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://{address}:{server.server_address[1]}"
        server.shutdown()


def content(data: bytes, status: int = 200, **headers):
    def reply(handler):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)

    return reply


def local(address: str) -> bool:
    """For the tests, one address of this machine counts as public."""
    return address == "127.0.0.1"


@pytest.mark.parametrize(
    "address",
    "127.0.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 255.255.255.255 ::1 :: "
    "fe80::1%eth0 fc00::1 ff02::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 2002:7f00:1::".split(),
)
def test_private_addresses(address):
    assert not is_public(address)


def test_public_addresses():
    assert is_public("8.8.8.8") and is_public("2606:4700::1111")


def test_downloads_and_their_limits():
    with answering(content(b"x" * 1000)) as url:
        assert download(url, 1000, 5, local) == b"x" * 1000
        with pytest.raises(ValueError, match=r"can't be downloaded \(it has more than 999 bytes\). Check the address"):
            download(url, 999, 5, local)
        with pytest.raises(ValueError, match=r"leads to 127.0.0.1, which is not a public address"):
            download(url, 1000, 5)
        with pytest.raises(ValueError, match=r"leads to (127.0.0.1|::1), which is not a public address"):
            download(url.replace("127.0.0.1", "localhost"), 1000, 5)
    with answering(content(b"", 404)) as url, pytest.raises(ValueError, match="HTTP status 404"):
        download(url, 1000, 5, local)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(ValueError, match="can't be downloaded"):
            download(f"http://127.0.0.1:{closed.getsockname()[1]}", 1000, 5, local)
    for url in ("ftp://example.org/x", "http:///x", "http://example.org/a b", "http://user:pass@:80"):
        with pytest.raises(ValueError, match=r"must be an http or https URL|can't be downloaded"):
            download(url, 1000, 5, local)


def test_redirects_are_checked_like_the_first_address():
    with answering(content(b"secret"), "127.0.0.2") as inside:
        with answering(content(b"", 302, Location=f"{inside}/x")) as url:
            assert download(url, 1000, 5, lambda address: True) == b"secret"
            with pytest.raises(ValueError, match=r"leads to 127.0.0.2, which is not a public address"):
                download(url, 1000, 5, local)
    with answering(content(b"", 302, Location="file:///etc/passwd")) as url:
        with pytest.raises(ValueError, match="must be an http or https URL"):
            download(url, 1000, 5, local)
    with (
        answering(content(b"", 302, Location="/again")) as url,
        pytest.raises(ValueError, match="more than 5 redirects"),
    ):
        download(url, 1000, 5, local)


def test_a_slow_download_ends():
    def drip(handler):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(50):
            handler.wfile.write(b"x")
            time.sleep(0.05)

    with answering(drip) as url:
        start = time.monotonic()
        with pytest.raises(ValueError, match=r"can't be downloaded"):
            download(url, 1000, 0.3, local)
        assert time.monotonic() - start < 2


def test_remote_pictures(monkeypatch):
    part = ImagePart.model_validate({"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}})
    with pytest.raises(ApiError, match=r"leads to 127.0.0.1, which is not a public address"):
        PictureReader(Limits(), allow_remote=True).parts([part], "messages")
    with answering(content(encoded(noise(8, 6)))) as url:
        monkeypatch.setattr("spa3r.serving.pictures.download", lambda url, *limits: download(url, *limits, local))
        part.image_url.url = f"{url}/x.png"
        [[picture]] = PictureReader(Limits(), allow_remote=True).parts([part], "messages")
    assert picture.size == (8, 6)
