"""Downloads for clients: http(s) only, never from addresses inside the server's network. Imports no torch.

A client names the address, so a download must not reach what only the server can reach. Every address that a name
resolves to must be public, the connection goes to the address that was checked, and redirects are checked like the
first address. Proxies of the environment are not used.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import time
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urljoin, urlsplit

from spa3r.media.files import describe

MAX_REDIRECTS = 5


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None)
    return ip.is_global and not ip.is_multicast and (mapped is None or mapped.is_global)


def download(url: str, max_bytes: int, max_seconds: float, is_allowed: Callable[[str], bool] = is_public) -> bytes:
    """The content at an address.

    Args:
        url: An http or https URL.
        max_bytes: Maximum size.
        max_seconds: Maximum time for everything together.
        is_allowed: Whether to connect to an IP address.

    Raises:
        ValueError: The address is not allowed or not reachable, or a limit is exceeded.
    """
    end, asked = time.monotonic() + max_seconds, url
    try:
        for _ in range(MAX_REDIRECTS + 1):
            connection = _connection(url, end, is_allowed)
            try:
                parts = urlsplit(url)
                target = (parts.path or "/") + f"?{parts.query}" * bool(parts.query)
                connection.request("GET", target, headers={"User-Agent": "spa3r", "Accept-Encoding": "identity"})
                sock = connection.sock  # the connection lets go of it if the server closes after its answer
                response = connection.getresponse()
                if response.status in (301, 302, 303, 307, 308) and (place := response.getheader("Location")):
                    url = urljoin(url, place)
                    continue
                if response.status != 200:
                    raise OSError(f"HTTP status {response.status}")
                return _content(response, sock, max_bytes, end)
            finally:
                connection.close()
        raise OSError(f"more than {MAX_REDIRECTS} redirects")
    except (OSError, HTTPException, UnicodeError) as error:
        raise ValueError(
            f"{describe(asked)} can't be downloaded ({str(error) or type(error).__name__}). Check the address, or send "
            "the content as a data URL."
        ) from error


def _connection(url: str, end: float, is_allowed: Callable[[str], bool]) -> HTTPConnection:
    """A connection to a checked address."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isascii() or " " in url:
        raise ValueError(
            f"A remote picture or video must be an http or https URL, percent-encoded, got {describe(url)}. Send the "
            "content as a data URL."
        )
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        raise ValueError(f"{describe(url)} has no valid port. Correct the address.") from None
    found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    addresses = [str(place[0]) for *_, place in found]
    if refused := [address for address in addresses if not is_allowed(address)]:
        raise ValueError(
            f"{describe(url)} leads to {refused[0]}, which is not a public address. Send the content as a data URL."
        )
    kind = _Tls if parts.scheme == "https" else _Plain
    return kind(parts.hostname, port, addresses[0], _left(end))


def _content(response: HTTPResponse, sock: socket.socket, max_bytes: int, end: float) -> bytes:
    content = bytearray()
    while block := response.read1(2**16):
        content += block
        if len(content) > max_bytes:
            raise OSError(f"it has more than {max_bytes} bytes")
        sock.settimeout(_left(end))
    return bytes(content)


def _left(end: float) -> float:
    """Seconds that are left."""
    if (seconds := end - time.monotonic()) <= 0:
        raise OSError("it takes too long")
    return seconds


class _Plain(HTTPConnection):
    """A connection to a given address of a host."""

    def __init__(self, host: str, port: int, address: str, timeout: float, **kwargs: Any):
        super().__init__(host, port, timeout=timeout, **kwargs)
        self._address = address

    def connect(self) -> None:
        self.sock = socket.create_connection((self._address, self.port), self.timeout)


class _Tls(_Plain, HTTPSConnection):
    def connect(self) -> None:
        super().connect()
        self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)
