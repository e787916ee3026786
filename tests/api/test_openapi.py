"""The OpenAPI document: complete, and true to what is answered."""

import json
import re
from dataclasses import replace
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI

from app.outcome import FailureCode
from tests.api.conftest import BOUNDS, AppMaker, calling
from tests.api.test_read import finish
from tests.jobs.actors import Client as Reader
from tests.jobs.actors import Worker

OPERATIONS = {
    "createBatch", "listBatches", "getBatch", "deleteBatch", "listBatchJobs", "streamBatchResults", "cancelBatch",
    "getJob", "getJobBody", "getHealth", "getReadiness",
}  # fmt: skip


@pytest.fixture
def document(app: FastAPI) -> dict[str, Any]:
    return app.openapi()


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(path, method, op) for path, ops in document["paths"].items() for method, op in ops.items()]


async def test_every_operation_is_described(document: dict[str, Any]) -> None:
    assert {operation["operationId"] for _, _, operation in operations(document)} == OPERATIONS
    for path, _, operation in operations(document):
        assert operation["summary"], path
        assert operation["tags"], path
        successes = [status for status in operation["responses"] if status.startswith("2")]
        assert successes, path
        for status, response in operation["responses"].items():
            assert response["description"], (path, status)
            if status not in ("204", "304"):
                for content in response["content"].values():
                    assert content["schema"], (path, status)
            if int(status) >= 400:
                assert list(response["content"]) == ["application/problem+json"], (path, status)
                assert response["content"]["application/problem+json"]["examples"], (path, status)


async def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    references = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document)))
    assert references == set(document["components"]["schemas"]) | references
    assert references <= set(document["components"]["schemas"])
    assert not [name for name in references if name.endswith("View")]
    assert document["components"]["schemas"]["FailureCode"]["enum"] == list(FailureCode)


async def test_no_field_takes_the_name_of_a_schema_in_generated_clients(document: dict[str, Any]) -> None:
    """Which call the object in a field by the schema it is in and the field's title."""
    schemas = document["components"]["schemas"]
    for name, schema in schemas.items():
        for field in schema.get("properties", {}).values():
            if field.get("type") == "object":
                assert name + field["title"].title().replace(" ", "") not in schemas


async def test_the_example_batches_work_as_they_stand(api: httpx2.AsyncClient, document: dict[str, Any]) -> None:
    content = document["paths"]["/v1/batches"]["post"]["requestBody"]["content"]["application/json"]
    assert len(content["examples"]) >= 2
    for example in content["examples"].values():
        response = await api.post("/v1/batches", json=example["value"])
        assert response.status_code == 202, response.text


async def test_every_example_works_once_there_is_a_finished_batch(
    api: httpx2.AsyncClient, reader: Reader, worker: Worker
) -> None:
    batch_id = await reader.submit("h.example")
    await finish(worker, reader, batch_id, b"hello")
    document = (await api.get("/openapi.json")).json()
    assert str(batch_id) in json.dumps(document)
    calls = sorted(operations(document), key=lambda call: call[1] == "delete")
    for path, method, operation in calls:
        url = path
        for parameter in operation.get("parameters", ()):
            if parameter["in"] == "path":
                url = url.replace("{" + parameter["name"] + "}", parameter["example"])
        body = None
        if "requestBody" in operation:
            body = next(iter(operation["requestBody"]["content"]["application/json"]["examples"].values()))["value"]
        response = await api.request(method, url, json=body)
        assert str(response.status_code) in operation["responses"], (method, url)
        assert response.status_code < 300, (method, url, response.text)


async def test_ids_are_not_told_to_those_without_the_token(make_app: AppMaker, reader: Reader) -> None:
    batch_id = await reader.submit("h.example")
    async with calling(make_app(api_token="a-token-of-16-or-more")) as api:
        response = await api.get("/openapi.json")
    assert str(batch_id) not in response.text
    document = response.json()
    assert document["security"] == [{"token": []}]
    needless = {path for path, _, operation in operations(document) if operation.get("security") == []}
    assert needless == {"/healthz", "/readyz"}


async def test_the_page_asks_for_a_token_only_where_there_is_one(document: dict[str, Any], make_app: AppMaker) -> None:
    assert "securitySchemes" not in document["components"]
    assert "securitySchemes" in make_app(api_token="a-token-of-16-or-more").openapi()["components"]


async def test_the_first_page_lists_the_failure_codes(document: dict[str, Any]) -> None:
    assert [code for code in FailureCode if f"`{code}`" not in document["info"]["description"]] == []


async def test_options_tell_what_the_operator_has_set(make_app: AppMaker) -> None:
    bounds = replace(BOUNDS, timeout_s=12.5, timeout_s_max=99.0, body_bytes_max=12_345_678, batch_jobs_max=777)
    schemas = make_app(bounds=bounds).openapi()["components"]["schemas"]
    options = schemas["BatchOptions"]["properties"]
    assert options["timeout_s"]["description"].endswith(" At most 99, default: 12.5.")
    assert options["body_bytes_max"]["description"].endswith(" Default and maximum: 12345678.")
    assert "At most 777, " in schemas["BatchRequest"]["properties"]["urls"]["description"]
