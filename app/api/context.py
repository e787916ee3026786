"""What the endpoints need of their process: the database, the intake and the waits."""

from dataclasses import dataclass

from fastapi import Request

from app.api.intake import Intake
from app.api.waiting import Waits
from app.jobs.database import LendDriver, Sessions


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Made once by `create_app`, handed to every endpoint."""

    sessions: Sessions
    lend_driver: LendDriver
    """For polls."""
    intake: Intake
    waits: Waits
    is_open: bool
    """No token is asked for: whoever sees the pages may see stored batches too."""


def context_of(request: Request) -> Context:
    """Return the context of the application that got the request. No dependency: FastAPI solves each at some length."""
    context: Context = request.app.state.context
    return context
