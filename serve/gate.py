"""What stands before every route: the bearer token, if one is set, and the limit on a body's size.

Plain ASGI: a request that may not pass is answered before its body is read or parsed.
"""

from __future__ import annotations

import hmac
import os

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN_VARIABLE = "FAC_RAY_TOKEN"
OPEN_PATHS = ("/healthz",)
MAX_BODY_BYTES = 4 << 20


class Gate:
    """Lets a request pass to the app behind it, or answers 401 or 413. Without a token in the environment: no 401."""

    def __init__(self, app: ASGIApp, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._token = os.environ.get(TOKEN_VARIABLE, "")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if not self._may_pass(scope["path"], headers):
            refusal = JSONResponse({"error": "a valid bearer token is needed"}, 401, {"WWW-Authenticate": "Bearer"})
            await refusal(scope, receive, send)
        elif _declared_bytes(headers) > self._max_body_bytes:
            await JSONResponse({"error": self._too_large()}, 413)(scope, receive, send)
        else:
            await self._app(scope, self._counted(receive), send)

    def _may_pass(self, path: str, headers: Headers) -> bool:
        if not self._token or path in OPEN_PATHS:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.encode(), self._token.encode())

    def _counted(self, receive: Receive) -> Receive:
        """The same body, refused as soon as it is too large, whatever length the client declared."""
        read_bytes = 0

        async def counted() -> Message:
            nonlocal read_bytes
            message = await receive()
            read_bytes += len(message.get("body", b""))
            if read_bytes > self._max_body_bytes:
                raise HTTPException(413, self._too_large())
            return message

        return counted

    def _too_large(self) -> str:
        return f"the body is larger than {self._max_body_bytes:,} bytes; send the texts in several requests"


def _declared_bytes(headers: Headers) -> int:
    declared = headers.get("content-length", "")
    return int(declared) if declared.isdecimal() else 0
