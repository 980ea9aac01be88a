"""What a client is told instead of an answer: a status and OpenAI's error object."""

from __future__ import annotations

from typing import Any

INVALID, DENIED, LIMITED, FAILED = (
    "invalid_request_error",
    "authentication_error",
    "rate_limit_error",
    "server_error",
)
"""OpenAI's types of errors."""


class Refusal(Exception):
    """A request that gets no answer, or none to its end.

    Args:
        status: of HTTP.
        message: the value, the rule and the remedy.
        param: the field of the request that it is about.
        code: OpenAI's short name of the reason, where it has one.
        retry: seconds after which another try makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {} if retry is None else {"Retry-After": str(retry)}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    @property
    def kind(self) -> str:
        """OpenAI's type of the error."""
        return {401: DENIED, 429: LIMITED}.get(self.status, INVALID if self.status < 500 else FAILED)

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}
