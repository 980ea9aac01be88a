"""How a model is served, and the address that it is served at."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass

from linearize.errors import LinearizeError


@dataclass(frozen=True)
class Settings:
    """How a model is served.

    Attributes:
        name: what clients call the model.
        host, port: where; port 0 takes a free one.
        token: that clients give, or None.
        slots: texts at once.
        queue: texts that wait beyond those.
        prompt, new: most tokens of a prompt and after it.
        piece: tokens of prompts that are read between two steps of the others; None: 512, on a GPU 2048.
        prompts: that are read together at most.
        body: bytes of a request.
        seconds: that a request may take.
        grace: seconds that running texts have once the server is asked to stop.
        graph: capture CUDA graphs where there is CUDA.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    slots: int = 16
    queue: int = 256
    prompt: int = 4096
    new: int = 1024
    piece: int | None = None
    prompts: int = 8
    body: int = 2**20
    seconds: float = 300.0
    grace: float = 10.0
    graph: bool = True


def bound(settings: Settings) -> socket.socket:
    """A socket at the host and port, which nobody can reach before `Served.run`.

    Raises:
        LinearizeError: the host is not this machine's alone and there is no token; the port is taken or forbidden.
    """
    if not settings.host.strip():
        raise LinearizeError("--host is empty; give an address such as 127.0.0.1, or 0.0.0.0 for all of them")
    if settings.token is None and not _is_loopback(settings.host):
        raise LinearizeError(
            f"--host {settings.host}: others could reach the server, and it has no token; set LINEARIZE_TOKEN (or "
            "--token), or leave --host at 127.0.0.1"
        )
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((settings.host, settings.port))
    except (OSError, TypeError, ValueError) as error:  # the latter two of names that no address can have
        made.close()
        raise taken(settings, error) from None
    return made


def taken(settings: Settings, error: Exception) -> LinearizeError:
    """The refusal of an address that cannot be listened on."""
    reason = getattr(error, "strerror", None) or error
    return LinearizeError(
        f"cannot listen on {settings.host}:{settings.port}: {reason}; take another --port (0 takes a free one) or "
        "--host"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
