"""Routes that refuse query parameters they do not have, or that are given twice."""

from collections import Counter
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
            if request.scope["query_string"]:
                self._refuse(request)
            return await handle(request)

        return refuse_or_handle

    def _refuse(self, request: Request) -> None:
        """Raise for what FastAPI would pass over. Where there are parameters, their model refuses unknown ones."""
        if not self.dependant.query_params:
            wrong = [{"type": self._why_forbidden(name), "loc": ("query", name)} for name in request.query_params]
        else:
            count = Counter(name for name, _ in request.query_params.multi_items())
            wrong = [{"type": "repeated", "loc": ("query", name)} for name in count if count[name] > 1]
        if wrong:
            raise RequestValidationError(wrong)

    def _why_forbidden(self, name: str) -> str:
        can_wait = any(field.alias == "Prefer" for field in self.dependant.header_params)
        return "wait_forbidden" if name == "wait" and can_wait else "extra_forbidden"
