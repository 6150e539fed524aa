"""The one shape in which a request is refused: a status, a stable code, a message, a place.

Left out: answers that the proxy in front makes itself; the README lists them.
"""

from __future__ import annotations

import math
from typing import Any

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A refusal that the caller sees, whole: nothing secret belongs into `message`.

    Args:
        status: HTTP status, 400 to 599.
        code: stable word for programs, such as `model_not_found`.
        message: what it was, what was expected, what to do.
        param: the place in the request, such as `input[3]`.
        retry_after: seconds after which another try makes sense.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after

    @property
    def type(self) -> str:
        """The family of the error, as OpenAI's clients name it."""
        if self.status >= 500:
            return "server_error"
        return _TYPES.get(self.status, "invalid_request_error")

    def body(self, request_id: str | None) -> dict[str, Any]:
        """Return the JSON answer."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "code": self.code,
                "param": self.param,
                "request_id": request_id,
            }
        }

    def headers(self) -> dict[str, str]:
        """Return the headers that belong to the status: what to wait, what to show."""
        headers = {}
        if self.retry_after is not None:
            # Whole seconds, as RFC 9110 section 10.2.3 wants them; 0 would invite a tight loop.
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers
