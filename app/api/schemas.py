"""What clients send and see: the models of requests and views, with their bounds and examples.

A bound that the operator sets is checked against `Bounds`, which validation is given as its context.
"""

import json
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from app.api.json_text import depth
from app.jobs.reads import Batch, Job, JobDetail
from app.outcome import FailureCode

NAME_CHARS_MAX = 200
CUSTOM_ID_CHARS_MAX = 200
METADATA_CHARS_MAX = 16 * 2**10
METADATA_DEPTH_MAX = 20
JOB_BODY_CHARS_MAX = 2**20
ACCEPTED_STATUSES_MAX = 50
ACCEPTED_STATUS = r"^[1-5](?:xx|[0-9]{2}(?:-[1-5][0-9]{2})?)$"
SKIPPED_SHOWN_MAX = 100

BatchStatus = Literal["queued", "running", "completed", "cancelled"]
JobStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]
FinishedStatus = Literal["succeeded", "failed", "cancelled"]
FINISHED_BATCH = frozenset({"completed", "cancelled"})

BATCH_ID_EXAMPLE = UUID("0198f2c1-b5e0-7d3c-9a4b-e1c02f6d7a10")
JOB_ID_EXAMPLE = UUID("0198f2c1-b5e4-8a61-8c1d-5b0e9f3a2c77")
SHA256_EXAMPLE = "3587cb776ce0e4e8237f215800b7dffba0f25865cb84550e87ea8bbac838c423"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What the operator lets one request ask for, and how long fetches take that are not told."""

    request_bytes_max: int
    batch_jobs_max: int
    timeout_s: float
    connect_timeout_s: float
    read_timeout_s: float
    timeout_s_max: float
    wire_bytes_max: int
    body_bytes_max: int
    header_bytes_max: int
    header_count_max: int
    redirects_max: int
    informational_max: int
    encodings_max: int


# Requests


def _within(bound: str) -> AfterValidator:
    def check(value: Any, info: ValidationInfo) -> Any:
        most = getattr(info.context, bound)
        if value is not None and value > most:
            raise PydanticCustomError("less_than_equal", "It must be at most {le}", {"le": most})
        return value

    return AfterValidator(check)


_JSON = json.JSONEncoder(ensure_ascii=False)


def _bounded_metadata(value: dict[str, Any] | None) -> dict[str, Any] | None:
    if value is None:
        return None
    if depth(value) > METADATA_DEPTH_MAX:
        raise PydanticCustomError("too_deep", "It must be at most {most} levels deep", {"most": METADATA_DEPTH_MAX})
    if len(_JSON.encode(value)) > METADATA_CHARS_MAX:
        raise PydanticCustomError(
            "string_too_long", "It must be at most {max_length} characters", {"max_length": METADATA_CHARS_MAX}
        )
    return value


def _known_status(value: str) -> str:
    if not re.fullmatch(ACCEPTED_STATUS, value):
        raise PydanticCustomError("invalid_value", 'Write statuses as "2xx", "404" or "200-299"')
    return value


def _known_statuses(values: list[str] | None) -> list[str] | None:
    for value in values or ():
        first, _, last = value.partition("-")
        if last and int(first) > int(last):
            raise PydanticCustomError("invalid_value", "A range of statuses should begin with the lower one")
    return values


class Strict(BaseModel):
    """A request model: no field that is not known, no value that has to be converted."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


Name = Annotated[str, Field(max_length=NAME_CHARS_MAX)]
CustomId = Annotated[str, Field(max_length=CUSTOM_ID_CHARS_MAX)]
Metadata = Annotated[dict[str, Any], AfterValidator(_bounded_metadata)]
Headers = dict[str, str]
TimeoutS = Annotated[float, Field(ge=0.1), _within("timeout_s_max")]
MaxAttempts = Annotated[int, Field(ge=1, le=10)]
AcceptedStatus = Annotated[str, AfterValidator(_known_status), Field(json_schema_extra={"pattern": ACCEPTED_STATUS})]
AcceptedStatuses = Annotated[
    list[AcceptedStatus], Field(min_length=1, max_length=ACCEPTED_STATUSES_MAX), AfterValidator(_known_statuses)
]


class BatchOptions(Strict):
    """How the jobs of a batch are fetched. What is left out is as the operator set it."""

    timeout_s: TimeoutS | None = Field(
        default=None, description="Total seconds of one attempt: name, connection, redirects and body together."
    )
    connect_timeout_s: TimeoutS | None = Field(
        default=None, description="Seconds for TCP and TLS to stand; never more than nine tenths of `timeout_s`."
    )
    read_timeout_s: TimeoutS | None = Field(
        default=None, description="Seconds of silence before and within a response."
    )
    wire_bytes_max: Annotated[int, Field(ge=1), _within("wire_bytes_max")] | None = Field(
        default=None, description="Largest body on the wire, in bytes."
    )
    body_bytes_max: Annotated[int, Field(ge=1), _within("body_bytes_max")] | None = Field(
        default=None, description="Largest decoded body, in bytes."
    )
    header_bytes_max: Annotated[int, Field(ge=1), _within("header_bytes_max")] | None = Field(
        default=None, description="Largest header block of a response, in bytes."
    )
    header_count_max: Annotated[int, Field(ge=0), _within("header_count_max")] | None = Field(
        default=None, description="Most header fields of a response."
    )
    redirects_max: Annotated[int, Field(ge=0), _within("redirects_max")] | None = Field(
        default=None, description="Most redirects followed."
    )
    informational_max: Annotated[int, Field(ge=0), _within("informational_max")] | None = Field(
        default=None, description="Most 1xx responses before the final one."
    )
    encodings_max: Annotated[int, Field(ge=0), _within("encodings_max")] | None = Field(
        default=None, description="Most content codings of one response."
    )
    follow_redirects: bool | None = Field(
        default=None, description="Whether redirects are followed; if not, a 3xx is the response. Default: true."
    )
    max_attempts: MaxAttempts | None = Field(default=None, description="Most tries of one job. Default: 3.")
    retry_unsafe: bool | None = Field(
        default=None,
        description="Whether POST, PUT, PATCH and DELETE are sent again although they may have arrived.",
    )
    accept_statuses: AcceptedStatuses | None = Field(
        default=None,
        description='Statuses with which a job succeeds: "2xx", "404" or "200-299". Default: ["2xx"].',
        examples=[["2xx", "404"]],
    )
    method: str | None = Field(
        default=None, description="Method of every job that names none. Default: GET.", examples=["GET"]
    )
    headers: Headers | None = Field(
        default=None,
        description="Headers of every job; a job's own header of the same name goes before. Never shown again.",
        examples=[{"Accept-Language": "en"}],
    )


class JobRequest(Strict):
    """One URL to fetch, with what differs from the batch's options."""

    url: str = Field(description="An http or https URL.", examples=["https://example.com/"])
    method: str | None = Field(default=None, description="GET, HEAD, OPTIONS, POST, PUT, PATCH or DELETE.")
    headers: Headers | None = Field(default=None, description="Headers of this job. Never shown again.")
    body: str | None = Field(default=None, max_length=JOB_BODY_CHARS_MAX, description="Body to send, encoded as UTF-8.")
    timeout_s: TimeoutS | None = Field(default=None, description="Total seconds of one attempt.")
    max_attempts: MaxAttempts | None = Field(default=None, description="Most tries of this job.")
    custom_id: CustomId | None = Field(
        default=None, description="A name of your own, by which jobs can be found; two may have the same."
    )
    metadata: Metadata | None = Field(default=None, description="Anything of your own, shown with the job.")


class BatchSettings(Strict):
    """All of a submitted batch but its jobs."""

    name: Name | None = Field(default=None, description="A name of your own, by which lists can be filtered.")
    metadata: Metadata | None = Field(default=None, description="Anything of your own, shown with the batch.")
    options: BatchOptions | None = Field(default=None, description="How its jobs are fetched.")
    on_invalid: Literal["reject", "skip"] = Field(
        default="reject",
        description="What to do when an entry is invalid: reject the batch, or leave the entry out and list it.",
    )


class BatchRequest(BatchSettings):
    """A batch to fetch: either `urls` or `jobs`."""

    urls: list[str] | None = Field(
        default=None,
        description="URLs to fetch, all alike; a batch of none is completed at once.",
        examples=[["https://example.com/"]],
    )
    jobs: list[JobRequest] | None = Field(default=None, description="URLs to fetch, each with settings of its own.")


# Views


class View(BaseModel):
    """A response model, made from a value of `jobs.reads`."""

    model_config = ConfigDict(from_attributes=True)


class CountsView(View):
    """Jobs of a batch by status; the five add up to `total`."""

    total: int = Field(examples=[2])
    queued: int = Field(examples=[0])
    running: int = Field(
        description="Taken by a worker: being fetched, or about to be, when their host or a slot is free.",
        examples=[0],
    )
    succeeded: int = Field(examples=[2])
    failed: int = Field(examples=[0])
    cancelled: int = Field(examples=[0])


class SkippedEntryView(BaseModel):
    """An entry that was left out of the batch because it was invalid."""

    index: int = Field(description="Its index in `urls` or `jobs`, from 0.")
    url: str | None = Field(description="Its URL, cut to 200 characters; null when it may hold a password.")
    pointer: str | None = Field(default=None, description="JSON Pointer to what is wrong.", examples=["/urls/1"])
    code: str = Field(examples=["scheme_not_allowed"])
    detail: str


class BatchLinks(BaseModel):
    """Where the batch and what belongs to it are found."""

    self: str
    jobs: str
    results: str
    cancel: str


class BatchView(View):
    """A batch and what has come of it so far."""

    id: UUID = Field(examples=[BATCH_ID_EXAMPLE])
    name: str | None = Field(examples=["first batch"])
    status: BatchStatus = Field(
        description="`completed`: every job is finished, not that all succeeded. `cancelled`: cancelled before that.",
        examples=["completed"],
    )
    counts: CountsView
    errors: dict[str, int] = Field(description="Finished jobs by failure code.", examples=[{}])
    http_statuses: dict[str, int] = Field(
        description="Finished jobs by HTTP status of the last response.", examples=[{"200": 2}]
    )
    wire_bytes: int = Field(description="Bytes of response bodies as received, of all attempts.", examples=[1256])
    body_bytes: int = Field(description="Bytes of response bodies, decoded, of all attempts.", examples=[2512])
    options: dict[str, Any] = Field(
        # of the title, generated clients make the name of a class: "Batch" and "Options" is one that there is
        title="Given options",
        description="The options that were set; of headers only the names.",
        examples=[{"timeout_s": 20}],
    )
    metadata: dict[str, Any] | None = Field(examples=[{"project": "docs"}])
    skipped: list[SkippedEntryView] = Field(description="Entries left out as invalid: the first 100.", examples=[[]])
    skipped_total: int = Field(description="How many entries were left out.", examples=[0])
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    cancel_requested_at: datetime | None = Field(
        description="When cancelling was asked for; the batch is `cancelled` once no job is left.", examples=[None]
    )
    links: BatchLinks


class BatchPage(BaseModel):
    """One page of batches, newest first."""

    data: list[BatchView]
    next_cursor: str | None = Field(description="The `cursor` of the next page; null on the last.", examples=[None])


class JobView(View):
    """A job and what came of it."""

    id: UUID = Field(examples=[JOB_ID_EXAMPLE])
    batch_id: UUID = Field(examples=[BATCH_ID_EXAMPLE])
    position: int = Field(description="Its place in the batch, from 0.", examples=[0])
    custom_id: str | None = Field(examples=[None])
    metadata: dict[str, Any] | None = Field(examples=[None])
    url: str = Field(description="The URL, normalised.", examples=["https://example.com/"])
    method: str = Field(examples=["GET"])
    host: str = Field(
        description="Host name, and port if not the usual one: limits go by it.", examples=["example.com"]
    )
    status: JobStatus = Field(description="A retry is `queued` with a later `run_at`.", examples=["succeeded"])
    attempts: int = Field(description="Attempts so far that count against `max_attempts`.", examples=[1])
    run_at: datetime | None = Field(
        description="When it may run, while it is queued: not before its host has rested.", examples=[None]
    )
    error: FailureCode | None = Field(description="Why it failed, or why its last attempt did.", examples=[None])
    error_detail: str | None = Field(examples=[None])
    http_status: int | None = Field(
        description="Status of the last response, also where the job failed after its head had come.", examples=[200]
    )
    final_url: str | None = Field(description="Where the redirects ended.", examples=["https://example.com/"])
    content_type: str | None = Field(examples=["text/html"])
    body_sha256: str | None = Field(examples=[SHA256_EXAMPLE])
    body_bytes: int | None = Field(description="Bytes of the body, decoded.", examples=[1256])
    wire_bytes: int | None = Field(description="Bytes of the body as received.", examples=[628])
    total_ms: float | None = Field(description="Milliseconds of the last attempt.", examples=[182.4])
    created_at: datetime
    started_at: datetime | None = Field(
        description="When a worker took it for its last attempt; it may have waited there for its host.",
        examples=[None],
    )
    finished_at: datetime | None


class JobPage(BaseModel):
    """One page of jobs, in the order they were given."""

    data: list[JobView]
    next_cursor: str | None = Field(description="The `cursor` of the next page; null on the last.", examples=[None])


class HopView(BaseModel):
    """A redirect that was followed."""

    url: str
    status: int


class EvidenceView(View):
    """How a fetch went, as far as it got; null where a step was not reached. A blocked fetch shows nothing."""

    redirects: list[HopView] = Field(default=[], description="Redirects that were followed, in order.")
    remote_address: str | None = Field(default=None, description="Where it connected to, if that is a public address.")
    http_version: str | None = None
    tls_version: str | None = None
    tls_expires_at: str | None = Field(default=None, description="When the server's certificate ends.")
    reused_connection: bool = False
    dns_ms: float | None = None
    connect_ms: float | None = None
    tls_ms: float | None = None
    first_byte_ms: float | None = None
    download_ms: float | None = None
    total_ms: float | None = None
    wire_bytes: int = 0
    body_bytes: int = 0
    flags: list[str] = Field(
        default=[], description="What was odd about a body that decoded all the same: `body_trailing_junk`."
    )


class AttemptView(View):
    """One try of a job."""

    number: int = Field(description="Counted from 1; a try that a crash or a shutdown ended has a number too.")
    error: FailureCode | None
    error_detail: str | None
    http_status: int | None
    started_at: datetime
    finished_at: datetime
    evidence: EvidenceView


class JobLinks(BaseModel):
    """Where the job and what belongs to it are found."""

    self: str
    body: str
    batch: str


class JobDetailView(JobView):
    """Everything known of a job."""

    request_header_names: list[str] = Field(
        description="Names of the headers that were asked for; their values are never shown.", examples=[["Accept"]]
    )
    response_headers: list[tuple[str, str]] | None = Field(
        description="Name and value of each response header, in order.",
        examples=[[["content-type", "text/html"]]],
    )
    evidence: EvidenceView | None = Field(description="How the last attempt went.")
    attempts_made: list[AttemptView] = Field(description="Every attempt, oldest first.")
    links: JobLinks


class ResultView(JobView):
    """One line of the results: a finished job, and of its response what `include` asks for."""

    response_headers: list[tuple[str, str]] | None = Field(
        default=None,
        description="Name and value of each response header, in order; null without a response. Only if included.",
    )
    body_text: str | None = Field(default=None, description="The body, when it is UTF-8. Only if included.")
    body_base64: str | None = Field(default=None, description="The body, when it is not. Only if included.")


class HealthView(BaseModel):
    """The state of this process."""

    status: Literal["ok"] = "ok"
    version: str = Field(examples=["0.1.0"])


def batch_view(batch: Batch) -> BatchView:
    """Show a batch: options without secrets, entries left out apart from how many there were."""
    skipped, skipped_total = _unpack_skipped(batch.skipped)
    return BatchView(
        id=batch.id,
        name=batch.name,
        status=batch.status,
        counts=CountsView.model_validate(batch.counts),
        errors=batch.errors,
        http_statuses=batch.http_statuses,
        wire_bytes=batch.wire_bytes,
        body_bytes=batch.body_bytes,
        options=_without_secrets(batch.options),
        metadata=batch.metadata,
        skipped=skipped,
        skipped_total=skipped_total,
        created_at=batch.created_at,
        started_at=batch.started_at,
        finished_at=batch.finished_at,
        cancel_requested_at=batch.cancel_requested_at,
        links=_batch_links(batch.id),
    )


def job_view(job: Job) -> JobView:
    """Show a job as lists do."""
    return JobView.model_validate(job)


def job_detail_view(job: JobDetail) -> JobDetailView:
    """Show everything known of a job."""
    links = JobLinks(self=f"/v1/jobs/{job.id}", body=f"/v1/jobs/{job.id}/body", batch=f"/v1/batches/{job.batch_id}")
    shown = {name: getattr(job, name) for name in JobDetailView.model_fields if name != "links"}
    return JobDetailView.model_validate({**shown, "links": links})


def pack_skipped(entries: list[dict[str, Any]], total: int) -> list[dict[str, Any]]:
    """Make what is stored of the entries left out: the first ones, and how many there were when these are not all."""
    return [*entries, {"total": total}] if total > len(entries) else entries


def _unpack_skipped(stored: list[dict[str, Any]]) -> tuple[list[SkippedEntryView], int]:
    total = next((entry["total"] for entry in stored if "total" in entry), len(stored))
    return [SkippedEntryView(**entry) for entry in stored if "total" not in entry], total


def _without_secrets(options: dict[str, Any]) -> dict[str, Any]:
    shown = {name: value for name, value in options.items() if name != "headers"}
    names = [name for name, _ in options.get("headers", ())]
    return {**shown, "header_names": names} if names else shown


def _batch_links(batch_id: UUID) -> BatchLinks:
    path = f"/v1/batches/{batch_id}"
    return BatchLinks(self=path, jobs=f"{path}/jobs", results=f"{path}/results", cancel=f"{path}/cancel")
