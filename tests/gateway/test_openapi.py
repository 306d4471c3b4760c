"""The OpenAPI document says what the code does."""

import re
from collections.abc import Mapping
from typing import Any, get_type_hints

import msgspec
import pytest
from tests.gateway.conftest import Stage

from prism.gateway import chat_api, completions_api, generate_api
from prism.gateway.openai_fields import HARMLESS_EVERYWHERE, StreamOptions
from prism.gateway.openapi import describe
from prism.gateway.openapi_schemas import SCHEMAS
from prism.gateway.sampling import RANGES

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    ("kind", "schema", "unsupported"),
    [
        (chat_api.ChatRequest, SCHEMAS["ChatRequest"], {*chat_api.HARMLESS, *HARMLESS_EVERYWHERE}),
        (chat_api.Message, SCHEMAS["Message"], set(chat_api.MESSAGE_HARMLESS)),
        (
            completions_api.CompletionRequest,
            SCHEMAS["CompletionRequest"],
            {*completions_api.HARMLESS, *HARMLESS_EVERYWHERE},
        ),
        (generate_api.GenerateBody, SCHEMAS["GenerateBody"], set(generate_api.HARMLESS)),
        (
            generate_api.GenerateSampling,
            SCHEMAS["GenerateBody"]["properties"]["sampling_params"],
            set(),
        ),
        (
            StreamOptions,
            SCHEMAS["ChatRequest"]["properties"]["stream_options"],
            {"include_obfuscation"},
        ),
    ],
)
def test_request_schema_lists_what_is_taken(
    kind: type[msgspec.Struct], schema: Mapping[str, Any], unsupported: set[str]
) -> None:
    assert set(schema["properties"]) == set(get_type_hints(kind)) - unsupported
    assert schema["additionalProperties"] is False
    needed = {field.name for field in msgspec.structs.fields(kind) if field.required}
    assert needed <= set(schema.get("required", []))


@pytest.mark.parametrize("name", ["ChatRequest", "CompletionRequest", "GenerateBody"])
def test_ranges_are_those_that_are_checked(name: str) -> None:
    properties = {**SCHEMAS[name]["properties"]}
    properties |= properties.pop("sampling_params", {}).get("properties", {})
    for field, allowed in RANGES.items():
        schema = properties.get(field)
        if schema is None or "seed" in field:
            continue
        low = schema.get("exclusiveMinimum", schema.get("minimum"))
        assert low == min(allowed.low, *allowed.also) if allowed.also else low == allowed.low
        assert ("exclusiveMinimum" in schema) is allowed.above
        if "maximum" in schema:
            assert schema["maximum"] == allowed.high


def test_references_lead_somewhere() -> None:
    text = msgspec.json.encode(describe("1")).decode()
    names = set(re.findall(r'"#/components/schemas/(\w+)"', text))
    assert names
    assert names <= set(SCHEMAS)


async def test_document_lists_every_route(shared_stage: Stage) -> None:
    document = (await shared_stage.http.get("/openapi.json")).json()
    assert document["openapi"] == "3.1.0"
    for path, operations in document["paths"].items():
        for method in ("get", "post", "put", "delete", "patch"):
            response = await shared_stage.http.request(method, path.replace("{model}", "m"), content=b"")
            assert (response.status_code != 405) is (method in operations), (method, path)
    told = (await shared_stage.http.get("/v1/models/m")).json()
    assert set(told) == set(SCHEMAS["Model"]["properties"])
