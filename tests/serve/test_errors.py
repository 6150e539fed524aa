"""The one shape of a refusal."""

from __future__ import annotations

import pytest

from serve.errors import ApiError


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "invalid_request_error"),
        (408, "invalid_request_error"),
        (409, "invalid_request_error"),
        (413, "invalid_request_error"),
        (415, "invalid_request_error"),
        (422, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (503, "server_error"),
    ],
)
def test_the_shape(status: int, kind: str) -> None:
    error = ApiError(status, "some_code", "what to do", param="input[3]")
    assert error.body("r1") == {
        "error": {
            "message": "what to do",
            "type": kind,
            "code": "some_code",
            "param": "input[3]",
            "request_id": "r1",
        }
    }


@pytest.mark.parametrize(("wait", "header"), [(0.0, "1"), (0.2, "1"), (1.2, "2"), (5, "5")])
def test_retry_after_is_in_whole_seconds_and_never_too_early(wait: float, header: str) -> None:
    assert ApiError(429, "c", "m", retry_after=wait).headers() == {"retry-after": header}


def test_headers_of_a_status() -> None:
    assert ApiError(401, "c", "m").headers() == {"www-authenticate": "Bearer"}
    assert ApiError(400, "c", "m").headers() == {}
