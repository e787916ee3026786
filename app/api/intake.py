"""Turns the bytes of a submitted batch into checked jobs: bounded while they arrive, then checked in a worker thread.

Stores nothing and resolves no name: where a URL's name leads is checked when it is fetched.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request

from app.api.faults import UNSTORABLE, Fault, Fields, faults_of, pointer
from app.api.json_text import HANDED_OUT, find_unstorable, may_be_unstorable, read_object
from app.api.problems import (
    BODY_TOO_LARGE,
    BODY_TOO_SLOW,
    BUSY,
    ERRORS_SHOWN_MAX,
    INVALID_JSON,
    INVALID_REQUEST,
    MEDIA_TYPE_NOT_SUPPORTED,
    OBJECT_EXPECTED,
    TOO_MANY_JOBS,
    Problem,
)
from app.api.schemas import (
    SKIPPED_SHOWN_MAX,
    BatchOptions,
    BatchRequest,
    BatchSettings,
    Bounds,
    JobRequest,
    pack_skipped,
)
from app.fetch.policy import Policy, Refused, check_headers, check_method, check_url
from app.jobs.ids import new_batch_id
from app.jobs.values import NewBatch, NewJobs
from app.outcome import FailureCode

THREADS = 2
LARGE_BODY_BYTES = 2**20
LARGE_BODIES_MAX = 2
"""Submissions over 1 MiB that are taken in at once, so that the memory they take has a bound."""

LARGE_BODY_WAIT_S = 60.0
BODY_READ_S = 120.0
DISCARD_S = 10.0
URL_SHOWN_CHARS_MAX = 200

SETTINGS_FIELDS: Fields = {(): BatchRequest.model_fields, ("options",): BatchOptions.model_fields}
JOB_FIELDS: Fields = {(): JobRequest.model_fields}


@dataclass(frozen=True, slots=True)
class Submission:
    """A batch as checked, ready to be stored."""

    batch: NewBatch
    jobs: NewJobs
    body_sha256: bytes


class Intake:
    """Takes submissions in: few large ones at once, and checks them in few threads."""

    def __init__(self, *, policy: Policy, bounds: Bounds) -> None:
        self.policy = policy
        self.bounds = bounds
        self._threads = ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="intake")
        self._large_bodies = asyncio.Semaphore(LARGE_BODIES_MAX)

    @asynccontextmanager
    async def submission(self, request: Request) -> AsyncIterator[Submission]:
        """Read and check the body of a request; it counts as being taken in until the block is left.

        Raises problems: wrong media type, too large, too slow, not JSON, too many jobs, or all that is wrong in it.
        """
        async with AsyncExitStack() as held:
            _require_json(request)
            yield await self._check(await self._read(request, held))

    def close(self) -> None:
        """Let the threads go."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _read(self, request: Request, held: AsyncExitStack) -> bytearray:
        most = self.bounds.request_bytes_max
        body, is_large = bytearray(), False
        await _refuse_announced(request, most)
        try:
            async with asyncio.timeout(BODY_READ_S):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > most:
                        break
                    if not is_large and len(body) > LARGE_BODY_BYTES:
                        is_large = True
                        await self._admit_large(held)
        except TimeoutError:
            raise Problem(BODY_TOO_SLOW) from None
        if len(body) > most:
            await _discard(request)
            raise _too_large(most)
        return body

    async def _admit_large(self, held: AsyncExitStack) -> None:
        try:
            async with asyncio.timeout(LARGE_BODY_WAIT_S):
                await self._large_bodies.acquire()
        except TimeoutError:
            raise Problem(BUSY) from None
        held.callback(self._large_bodies.release)

    async def _check(self, body: bytearray) -> Submission:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, check, body, self.policy, self.bounds)


def check(body: bytes | bytearray, policy: Policy, bounds: Bounds) -> Submission:
    """Check a whole submission; takes half a second for 100,000 jobs, so call it in a thread.

    Raises problems: not JSON, too many jobs, or all that is wrong in it.
    """
    text = _decode(body)
    entries = Entries(policy, bounds, look_for_unstorable=may_be_unstorable(text))
    return _submission(text, entries, body_sha256=hashlib.sha256(body).digest())


def _submission(text: str, entries: "Entries", *, body_sha256: bytes) -> Submission:
    members = read_object(text, lists={"urls": entries.add_url, "jobs": entries.add_job})
    lists = {name: members.pop(name, None) for name in ("urls", "jobs")}
    faults = _list_faults(lists)
    settings = _settings(members, entries.bounds, faults)
    faults = faults or _unstorable_faults(members, ())
    fault_count = len(faults)
    if settings is None or settings.on_invalid == "reject":
        faults, fault_count = [*faults, *entries.faults], fault_count + entries.fault_count
    if settings is None or faults:
        raise Problem(INVALID_REQUEST, faults=faults, fault_count=fault_count)
    return Submission(_new_batch(settings, entries), entries.jobs, body_sha256)


@dataclass(slots=True)
class Entries:
    """The entries of a batch as they are read: jobs, and what is wrong with the others."""

    policy: Policy
    bounds: Bounds
    look_for_unstorable: bool
    jobs: NewJobs = field(default_factory=NewJobs)
    faults: list[Fault] = field(default_factory=list)
    fault_count: int = 0
    skipped: list[dict[str, Any]] = field(default_factory=list)
    skipped_count: int = 0

    def add_url(self, index: int, value: Any) -> None:
        """Check an element of `urls`."""
        self._bound(index)
        try:
            target = check_url(_text(value), self.policy)
        except Refused as refused:
            self._leave_out(index, value, [Fault(f"/urls/{index}", refused.code, refused.detail)])
        else:
            self.jobs.add(target.url, target.host)

    def add_job(self, index: int, value: Any) -> None:
        """Check an element of `jobs`."""
        self._bound(index)
        faults = self._job(index, value)
        if faults:
            self._leave_out(index, value.get("url") if isinstance(value, dict) else None, faults)

    def _job(self, index: int, value: Any) -> list[Fault]:
        place = ("jobs", index)
        try:
            job = JobRequest.model_validate(value, context=self.bounds)
        except ValidationError as error:
            return _faults_of(error, prefix=place, fields=JOB_FIELDS)
        faults = _request_faults(job, place)
        try:
            target = check_url(job.url, self.policy)
        except Refused as refused:
            return [Fault(pointer((*place, "url")), refused.code, refused.detail), *faults]
        if self.look_for_unstorable:
            faults = faults or _unstorable_faults(value, place)
        if not faults:
            self.jobs.add(
                target.url,
                target.host,
                request=_request(job),
                custom_id=job.custom_id,
                metadata=job.metadata,
            )
        return faults

    def _bound(self, index: int) -> None:
        if index >= self.bounds.batch_jobs_max:
            raise Problem(
                TOO_MANY_JOBS, f"A batch takes at most {self.bounds.batch_jobs_max:,} jobs; send several batches."
            )

    def _leave_out(self, index: int, url: Any, faults: list[Fault]) -> None:
        self.fault_count += len(faults)
        self.skipped_count += 1
        if len(self.faults) < ERRORS_SHOWN_MAX:
            self.faults += faults
        if len(self.skipped) < SKIPPED_SHOWN_MAX:
            first = faults[0]
            shown = {"index": index, "url": _shown(url), "pointer": first.pointer}
            self.skipped.append({**shown, "code": first.code, "detail": first.detail})


def _require_json(request: Request) -> None:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if media_type != "application/json" or coding != "identity":
        raise Problem(MEDIA_TYPE_NOT_SUPPORTED, headers={"Accept-Post": "application/json"})


async def _refuse_announced(request: Request, most: int) -> None:
    """Refuse a body by its announced length; a client that asks first (Expect: 100-continue) never sends it."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > most:
        if "expect" not in request.headers:
            await _discard(request)
        raise _too_large(most)


async def _discard(request: Request) -> None:
    """Read on for a while: closing on a client that still sends resets the connection, and it never sees the answer."""
    try:
        async with asyncio.timeout(DISCARD_S):
            async for _ in request.stream():
                pass
    except TimeoutError:
        return


def _too_large(most: int) -> Problem:
    return Problem(BODY_TOO_LARGE, f"A request body is at most {most:,} bytes; send several smaller batches.")


def _decode(body: bytes | bytearray) -> str:
    if not body or body.isspace():
        raise Problem(INVALID_JSON, f"The body is empty. {OBJECT_EXPECTED}")
    try:
        return body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Problem(INVALID_JSON, f"The body is not UTF-8 at byte {error.start}. {OBJECT_EXPECTED}") from None


def _text(url: Any) -> str:
    if not isinstance(url, str):
        raise Refused(FailureCode.INVALID_URL, "The URL must be a string.")
    return url


def _list_faults(lists: dict[str, Any]) -> list[Fault]:
    wrong = [name for name, value in lists.items() if value is not None and value is not HANDED_OUT]
    if wrong:
        return [Fault(pointer((name,)), "invalid_type", "It must be a list.") for name in wrong]
    given_count = sum(value is HANDED_OUT for value in lists.values())
    if given_count == 0:
        return [Fault("", "missing", "Give the URLs to fetch as urls or as jobs.")]
    return [] if given_count == 1 else [Fault("/jobs", "conflict", "Give either urls or jobs, not both.")]


def _faults_of(error: ValidationError, *, prefix: tuple[str | int, ...] = (), fields: Fields) -> list[Fault]:
    faults = faults_of(error.errors(include_url=False, include_input=False), prefix=prefix, fields=fields)
    return [_led_to_options(fault) for fault in faults]


def _led_to_options(fault: Fault) -> Fault:
    name = fault.pointer.rpartition("/")[2]
    if fault.code != "unknown_field" or name not in BatchOptions.model_fields:
        return fault
    return replace(fault, detail=f'It goes in options: {{"options": {{"{name}": …}}}}.')


def _unstorable_faults(value: Any, place: tuple[str | int, ...]) -> list[Fault]:
    path = find_unstorable(value, place)
    return [] if path is None else [Fault(pointer(path), "invalid_text", UNSTORABLE)]


def _settings(members: dict[str, Any], bounds: Bounds, faults: list[Fault]) -> BatchSettings | None:
    """Validate all but the jobs; what is wrong is added to `faults`."""
    try:
        settings = BatchSettings.model_validate(members, context=bounds)
    except ValidationError as error:
        faults += _faults_of(error, fields=SETTINGS_FIELDS)
        return None
    faults += _request_faults(settings.options or BatchOptions(), ("options",))
    return settings


def _request_faults(request: BatchOptions | JobRequest, place: tuple[str | int, ...]) -> list[Fault]:
    faults = []
    try:
        check_method("GET" if request.method is None else request.method)
    except Refused as refused:
        faults.append(Fault(pointer((*place, "method")), refused.code, refused.detail))
    try:
        check_headers((request.headers or {}).items())
    except Refused as refused:
        faults.append(Fault(pointer((*place, "headers")), refused.code, refused.detail))
    return faults


def _new_batch(settings: BatchSettings, entries: Entries) -> NewBatch:
    return NewBatch(
        id=new_batch_id(),
        name=settings.name,
        metadata=settings.metadata,
        options=_stored(settings.options or BatchOptions()),
        skipped=pack_skipped(entries.skipped, entries.skipped_count),
    )


def _request(job: JobRequest) -> dict[str, Any]:
    """What of a job goes before the batch's options."""
    return {name: value for name, value in _stored(job).items() if name not in ("url", "custom_id", "metadata")}


def _stored(request: BatchOptions | JobRequest) -> dict[str, Any]:
    """What the client set, as it is stored: the method in capitals, headers as a list of name and value."""
    stored = {name: value for name in request.model_fields_set if (value := getattr(request, name)) is not None}
    if "method" in stored:
        stored["method"] = check_method(stored["method"])
    if "headers" in stored:
        stored["headers"] = [list(header) for header in stored["headers"].items()]
    return stored


def _shown(url: Any) -> str | None:
    """Show a URL that was left out; not one that may hold a password, and nothing that cannot be stored or read."""
    if not isinstance(url, str) or "@" in url:
        return None
    cut = url[:URL_SHOWN_CHARS_MAX]
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in cut)
