"""A request's body, whole and no larger than its path takes. Knows nothing of what it says."""

from __future__ import annotations

from starlette.requests import ClientDisconnect, Request

from serving.openai_wire import CLIENT_GONE, Denied


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Read it.

    Raises:
        Denied: 413, it is larger; 499, the client left before its end.
    """
    pieces, size = [], 0
    try:
        async for piece in request.stream():
            size += len(piece)
            if size > max_bytes:
                raise Denied(413, f"body: more than {max_bytes} bytes", code="too_large")
            pieces.append(piece)
    except ClientDisconnect:
        raise Denied(CLIENT_GONE, "The client left before its request was whole") from None
    return b"".join(pieces)
