"""HEAD for every path that takes GET: the same answer without its bytes (RFC 9110, 9.3.2). Knows no path."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Heads:
    """Runs HEAD as GET up to the first byte of the body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; of a HEAD, send back the head alone."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
            else:
                await send({"type": "http.response.body", "body": b""})
                raise _Told  # or a stream would be read to its end for nothing

        try:
            await self.app({**scope, "method": "GET"}, receive, send_head)
        except _Told:
            return


class _Told(Exception):
    """All that a HEAD asks for has been sent."""
