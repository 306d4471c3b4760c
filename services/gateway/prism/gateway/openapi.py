"""The OpenAPI 3.1 document of this gateway, kept by hand; a test compares it with the code."""

from typing import Any

from prism.gateway.openapi_schemas import SCHEMAS

JSON = "application/json"


def describe(version: str) -> dict[str, Any]:
    """The document. `version` is the gateway's."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Prism gateway",
            "version": version,
            "description": "OpenAI-compatible endpoints for many models on few GPUs. A parameter that is "
            "not listed here is refused with 400, never ignored.",
        },
        "paths": {
            "/v1/models": {"get": _get("All models and how they stand", "ModelList")},
            "/v1/models/{model}": {
                "get": {
                    **_get("One model and how it stands", "Model", 404),
                    "parameters": [
                        {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
                    ],
                }
            },
            "/v1/chat/completions": {
                "post": _generation("Answer a conversation", "ChatRequest", "ChatCompletion")
            },
            "/v1/completions": {
                "post": _generation("Continue prompts", "CompletionRequest", "TextCompletion")
            },
            "/generate": {
                "post": _generation(
                    "Continue prompts, as SGLang's endpoint of this name", "GenerateBody", "Generated"
                )
            },
            "/healthz": {"get": _get("Whether the process lives", "Status")},
            "/readyz": {"get": _get("Whether requests can be served now", "Status", not_ready=True)},
            "/health": {
                "get": _get("The same as /readyz, as vLLM and SGLang name it", "Status", not_ready=True)
            },
            "/metrics": {
                "get": {
                    "summary": "Prometheus metrics",
                    "responses": {
                        "200": {
                            "description": "Prometheus text format",
                            "content": {"text/plain": {"schema": {"type": "string"}}},
                        }
                    },
                }
            },
            "/openapi.json": {
                "get": {
                    "summary": "This document",
                    "responses": {
                        "200": {
                            "description": "OpenAPI 3.1",
                            "content": {JSON: {"schema": {"type": "object"}}},
                        }
                    },
                }
            },
        },
        "components": {"schemas": SCHEMAS},
    }


def _content(schema: str) -> dict[str, Any]:
    return {JSON: {"schema": {"$ref": f"#/components/schemas/{schema}"}}}


def _get(summary: str, schema: str, *errors: int, not_ready: bool = False) -> dict[str, Any]:
    responses: dict[str, Any] = {"200": {"description": "OK", "content": _content(schema)}}
    responses |= {str(status): _error(status) for status in errors}
    if not_ready:
        responses["503"] = {"description": "Not now; `reason` says why", "content": _content(schema)}
    return {"summary": summary, "responses": responses}


_ERRORS = {
    400: "A parameter is unknown, unsupported or out of range, or the prompt is too long",
    404: "No such model",
    413: "The body, or the message that it would become on the bus, is too large",
    429: "Too many requests wait already; see Retry-After",
    500: "A fault of the server",
    503: "The model failed or did not become ready in time; see Retry-After",
}


def _error(status: int) -> dict[str, Any]:
    response: dict[str, Any] = {"description": _ERRORS[status], "content": _content("Error")}
    if status in (429, 503):
        response["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds"}}
    return response


def _generation(summary: str, request: str, answer: str) -> dict[str, Any]:
    objectives = {
        "X-SLO-TTFT-Ms": "Objective for the time to the first token, from 1 ms to a day; else the model's",
        "X-SLO-TPOT-Ms": "Objective for the time per token after the first, as long; else the model's",
    }
    streamed = {
        "schema": {},
        "description": "With `stream`: server-sent events, `data: {...}` each, the last one `data: [DONE]`. "
        'A stream that fails ends with `data: {"error": ...}` and without [DONE].',
    }
    return {
        "summary": summary,
        "parameters": [
            {
                "name": name,
                "in": "header",
                "description": text,
                "schema": {"type": "number", "exclusiveMinimum": 0},
            }
            for name, text in objectives.items()
        ],
        "requestBody": {"required": True, "content": _content(request)},
        "responses": {
            "200": {"description": "OK", "content": {**_content(answer), "text/event-stream": streamed}},
            **{str(status): _error(status) for status in _ERRORS},
        },
    }
