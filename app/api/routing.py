"""Routes that refuse query parameters where they take none, as those that take some do by themselves."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class StrictRoute(APIRoute):
    """A route for which no parameter is left unread: a mistaken one would seem to have been obeyed."""

    def get_route_handler(self) -> Handler:
        """Return what answers a request; not as a dependency, which FastAPI solves at some length."""
        handle = super().get_route_handler()

        async def refuse_or_handle(request: Request) -> Response:
            if request.scope["query_string"] and (names := request.query_params.keys()):
                raise RequestValidationError([{"type": "extra_forbidden", "loc": ("query", name)} for name in names])
            return await handle(request)

        return handle if self.dependant.query_params else refuse_or_handle
