"""Parts of the OpenAPI page that no model can say: the example batches, and bodies that are not JSON."""

from typing import Any

from app.api.schemas import BATCH_ID_EXAMPLE, JOB_ID_EXAMPLE

FIRST_BATCH: dict[str, Any] = {"urls": ["https://example.com/", "https://example.org/"], "name": "first batch"}

JOBS_BATCH: dict[str, Any] = {
    "name": "jobs of their own",
    "jobs": [
        {"url": "https://example.com/", "custom_id": "home", "headers": {"Accept-Language": "en"}},
        {"url": "https://example.org/", "method": "HEAD", "timeout_s": 10, "metadata": {"kind": "probe"}},
    ],
    "options": {"timeout_s": 20, "max_attempts": 2, "accept_statuses": ["2xx", "404"]},
    "metadata": {"project": "docs"},
}

SKIPPING_BATCH: dict[str, Any] = {"urls": ["https://example.com/", "ftp://example.com/"], "on_invalid": "skip"}

BATCH_REQUEST: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/BatchRequest"},
                "examples": {
                    "urls": {"summary": "Two pages", "value": FIRST_BATCH},
                    "jobs": {"summary": "Jobs with settings of their own", "value": JOBS_BATCH},
                    "skip": {"summary": "Leave out what is invalid", "value": SKIPPING_BATCH},
                },
            }
        },
    }
}

FOLLOW_HEADERS: dict[str, Any] = {
    "ETag": {"description": "For If-None-Match.", "schema": {"type": "string"}},
    "Retry-After": {
        "description": "After how many seconds to look again; not when the batch is finished.",
        "schema": {"type": "integer"},
    },
    "Preference-Applied": {"description": "The wait that was honoured.", "schema": {"type": "string"}},
}
CREATED_HEADERS: dict[str, Any] = {
    "Location": {"description": "Where the batch is found.", "schema": {"type": "string"}},
    **FOLLOW_HEADERS,
}
PAGE_HEADERS: dict[str, Any] = {
    "Link": {"description": 'The next page, rel="next"; not on the last.', "schema": {"type": "string"}}
}
BODY_HEADERS: dict[str, Any] = {
    "ETag": {"description": "The SHA-256 of the bytes, quoted.", "schema": {"type": "string"}},
    "Content-Disposition": {"description": "Always an attachment.", "schema": {"type": "string"}},
}

RESULT_LINE = (
    f'{{"id":"{JOB_ID_EXAMPLE}","batch_id":"{BATCH_ID_EXAMPLE}","position":0,'
    '"url":"https://example.com/","status":"succeeded","http_status":200}\n'
)
RESULT_LINES: dict[str, Any] = {
    "application/x-ndjson": {"schema": {"$ref": "#/components/schemas/Result"}, "example": RESULT_LINE}
}

BYTES: dict[str, Any] = {"*/*": {"schema": {"type": "string", "format": "binary"}}}
