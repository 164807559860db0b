"""Errors as OpenAI's clients expect them: ``{"error": {message, type, param, code}}`` and a status.

A client library chooses its exception by the status: 400 is a bad request, 401 a wrong key, 404 a
model that is not here, 413 too large a body, 429 a full queue, 503 an engine that cannot serve.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minivllm import errors

#: Seconds after which a client may try again, where nothing else is known.
RETRY_AFTER = 1

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class APIError(errors.MiniVLLMError):
    """A request that is answered with an error.

    status: of HTTP. retry_after: seconds after which the client may try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str = "",
        retry_after: int = RETRY_AFTER,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        return body(self.status, str(self), self.param, self.code)

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        if self.status in (429, 503):
            return {"Retry-After": str(self.retry_after)}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}


def body(status: int, message: str, param: str | None = None, code: str = "") -> dict[str, Any]:
    """The JSON of an error."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code or None}}


def as_api_error(error: errors.MiniVLLMError) -> APIError:
    """An error of the engine, as the client sees it."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, errors.PromptTooLongError):
        return APIError(400, str(error), code="context_length_exceeded")
    if isinstance(error, errors.InvalidLogitsError):
        return APIError(500, str(error))
    if isinstance(error, errors.RequestError | errors.UnsupportedFeatureError):
        return APIError(400, str(error))
    return APIError(503, str(error))


def from_validation(first: Mapping[str, Any], *head: str) -> APIError:
    """What is wrong with a body, in one sentence that names the field.

    first: the first error of pydantic. head: what stands before the field in its place.
    """
    # Members of a union are named by their types, which say nothing here.
    path = [str(part) for part in first["loc"][len(head) :] if not _is_of_a_union(part)]
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return APIError(400, f"The body is not JSON: {first.get('ctx', {}).get('error', message)}.")
    if not path:
        return APIError(400, message)
    where = ".".join(path)
    return APIError(400, f"{where}: {message}", param=where)


def _is_of_a_union(part: Any) -> bool:
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "float", "bool"))
