"""What the endpoints need of their process: the sessions, the intake and the waits."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from app.api.intake import Intake
from app.api.waiting import Waits
from app.jobs.database import Sessions


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Made once by `create_app`, handed to every endpoint."""

    sessions: Sessions
    autocommit: Sessions
    """For what one SELECT answers, and is asked for often."""
    intake: Intake
    waits: Waits
    is_open: bool
    """No token is asked for: whoever sees the pages may see stored batches too."""


async def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


Here = Annotated[Context, Depends(_context)]
