"""The endpoints: who may ask, how much, and what they are answered."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from contextlib import suppress
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from linearize.registry import closest
from linearize.serve.answers import as_json
from linearize.serve.asked import Reader
from linearize.serve.connections import TOLD
from linearize.serve.fields import parsed
from linearize.serve.job import Job, deadline
from linearize.serve.metrics import Metrics
from linearize.serve.refusal import Refusal
from linearize.serve.scheduler import Scheduler

log = logging.getLogger(__name__)

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PATHS = (CHAT, COMPLETIONS, "/v1/models", "/health", "/metrics")
OPEN = ("/health",)
"""What needs no token."""
LINGER, QUIET = 30.0, 5.0
"""Seconds that the rest of a body is read behind a refusal, and that nothing of it may come."""
MOST_UNREAD = 2**28
"""Bytes of it that are read, and thrown away."""
GONE = 499
"""nginx's status of requests whose client has gone."""


class Service:
    """What the endpoints share.

    Args:
        reader: of bodies.
        scheduler: that makes texts.
        metrics: that count.
    """

    def __init__(self, reader: Reader, scheduler: Scheduler, metrics: Metrics) -> None:
        self.reader, self.scheduler, self.metrics = reader, scheduler, metrics
        self._one = asyncio.Lock()
        self._born = int(time.time())

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(request, chat=True)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._answer(request, chat=False)

    async def models(self, request: Request) -> Response:
        """GET /v1/models: the one model."""
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        name = request.path_params["name"]
        if name != self.reader.name:
            raise Refusal(
                404,
                f"the model {name[:60]!r} is not served here; it is '{self.reader.name}'",
                code="model_not_found",
            )
        return _json(self._model())

    async def health(self, request: Request) -> Response:
        """GET /health: 200 while texts are taken on and made."""
        self.scheduler.check()
        return _json({"status": "ok"})

    async def numbers(self, request: Request) -> Response:
        """GET /metrics, for Prometheus."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    def _model(self) -> dict[str, Any]:
        return {"id": self.reader.name, "object": "model", "created": self._born, "owned_by": "linearize"}

    async def _answer(self, request: Request, *, chat: bool) -> Response:
        ends = deadline(self.reader.limits.seconds)
        body = await self._body(request)
        async with self._one:  # tokenizers are not made for several threads
            asked = await run_in_threadpool(lambda: self.reader.read(parsed(body), chat=chat))
        job = Job(asked, self.scheduler, self.reader.tokenizer, self.reader.name, ends)
        if asked.stream:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return _Events(job, headers)
        whole, gone = asyncio.ensure_future(job.whole()), asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
            if whole.done():
                return _json(whole.result())
            raise ClientDisconnect
        finally:
            job.cancel()
            for task in (whole, gone):
                task.cancel()
                with suppress(asyncio.CancelledError, Refusal):
                    await task

    async def _body(self, request: Request) -> bytes:
        """A body of at most so many bytes, within the time that a request may take."""
        limits = self.reader.limits
        told = request.headers.get("content-length", "0")
        much = Refusal(413, f"the body has more than {limits.body:,} bytes, the most that is taken here")
        much.headers["Connection"] = "close"
        if told.isdecimal() and int(told[:20]) > limits.body:
            raise much
        parts, size = [], 0
        try:
            async with asyncio.timeout(limits.seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > limits.body:
                        raise much
                    parts.append(part)
        except TimeoutError:
            raise Refusal(408, f"the body did not come within {limits.seconds:g} s") from None
        return b"".join(parts)


class _Events(StreamingResponse):
    """A job's events; whoever goes away, be it before the first, leaves its slots free."""

    def __init__(self, job: Job, headers: dict[str, str]) -> None:
        super().__init__(job.events(), media_type="text/event-stream", headers=headers)
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()


class _BeforeTheEnd(Response):
    """An answer to a request whose body is still on its way.

    A connection that is closed with bytes unread is reset, which takes the answer from a client that has not read it
    yet; many do not begin to before they have sent everything. So the rest is read for a while, a piece at a time.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await send(start)
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        left, ends = MOST_UNREAD, time.monotonic() + LINGER
        with suppress(TimeoutError):
            # not `asyncio.timeout` around it: where a piece comes as it runs out, `wait_for` of 3.11 takes the piece
            while left > 0 and (seconds := ends - time.monotonic()) > 0:
                message = await asyncio.wait_for(receive(), min(QUIET, seconds))
                left -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    break
        await send({"type": "http.response.body", "body": b""})


class Counted:
    """ASGI middleware: counts answers by endpoint and status, and asks for the token.

    Args:
        app: behind it.
        metrics: to count in.
        token: that clients give, or None.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, token: str | None) -> None:
        self.app, self.metrics, self._token = app, metrics, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in PATHS else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(path, str(scope.get(TOLD, message["status"]))).inc()
            await send(message)

        if path not in OPEN and not self._may(scope):
            refusal = Refusal(
                401,
                "this server wants a token: send the header 'Authorization: Bearer TOKEN' (OpenAI's clients: api_key)",
                code="invalid_api_key",
            )
            await _refused(refusal)(scope, receive, counted)
            return
        await self.app(scope, receive, counted)

    def _may(self, scope: Scope) -> bool:
        if self._token is None:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, token = given.partition(b" ")
        # compared in constant time, so that no answer's time tells how much of a guess is right
        same = hmac.compare_digest(token.strip(), self._token.encode())
        return same and kind.lower() == b"bearer"


def build(service: Service, token: str | None) -> ASGIApp:
    """The application: endpoints, errors in OpenAI's form, the token in front."""
    routes = [
        Route(CHAT, service.chat, methods=["POST"]),
        Route(COMPLETIONS, service.completions, methods=["POST"]),
        Route("/v1/models", service.models, methods=["GET"]),
        Route("/v1/models/{name:path}", service.model, methods=["GET"]),
        Route("/health", service.health, methods=["GET"]),
        Route("/metrics", service.numbers, methods=["GET"]),
    ]
    handlers: Any = {
        Refusal: _on_refusal,
        HTTPException: _on_http,
        ClientDisconnect: _on_gone,
        Exception: _on_bug,
    }
    made = Starlette(routes=routes, exception_handlers=handlers)
    made.router.redirect_slashes = False  # a path with a slash too many is a wrong path, and told so
    return Counted(made, service.metrics, token)


async def _gone(request: Request) -> None:
    """Ends when the client does."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    if error.status == 413:
        return _BeforeTheEnd(as_json(error.body()), error.status, error.headers, "application/json")
    return _refused(error)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    message = str(error.detail)
    if error.status_code == 404:
        message = f"there is no {path[:80]}; {closest(path, PATHS)}"
    if error.status_code == 405:
        message = (
            f"{path} does not take {request.method}; it takes {(error.headers or {}).get('Allow', 'another')}"
        )
    refusal = Refusal(error.status_code, message)
    refusal.headers |= error.headers or {}
    return _refused(refusal)


async def _on_gone(request: Request, error: Exception) -> Response:
    """Nobody reads it, but it is counted, and not among this server's mistakes."""
    return Response(status_code=GONE)


async def _on_bug(request: Request, error: Exception) -> Response:
    return _refused(Refusal(500, f"a mistake of this server ({type(error).__name__}); its log has more"))


def _refused(refusal: Refusal) -> Response:
    return _json(refusal.body(), refusal.status, refusal.headers)


def _json(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(as_json(body), status, headers, "application/json")
