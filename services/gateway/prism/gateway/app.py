"""The HTTP application: which path does what."""

from collections.abc import Callable
from importlib.metadata import version

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from prism.common.errors import PrismError
from prism.gateway.chat_api import plan_chat
from prism.gateway.completions_api import plan_completion
from prism.gateway.errors_http import error_response, internal_error_response, not_found_response
from prism.gateway.exchange import GenerationEndpoint, Planned
from prism.gateway.generate_api import plan_generate
from prism.gateway.metrics import Metrics
from prism.gateway.openapi import describe
from prism.gateway.registry import ModelStatus, Registry

DISTRIBUTION = "prism-serving-gateway"


def build_app(
    *,
    registry: Registry,
    metrics: Metrics,
    endpoint: Callable[[str, Planned], GenerationEndpoint],
    unready: Callable[[], str | None],
    created: int,
) -> Starlette:
    """The application. `endpoint` makes a generation endpoint of a name and its planner, `unready` says why
    the gateway cannot serve now (None: it can), `created` is the Unix time that models are dated with."""

    def describe_model(status: ModelStatus) -> dict[str, object]:
        return {
            "id": status.name,
            "object": "model",
            "created": created,
            "owned_by": "prism",
            "state": status.state,
            "reason": status.reason,
            "context_length": status.context_length,
            "devices": status.devices,
        }

    async def models(request: Request) -> Response:
        data = [describe_model(registry.status(name)) for name in registry.names()]
        return _json({"object": "list", "data": data})

    async def model(request: Request) -> Response:
        return _json(describe_model(registry.status(request.path_params["model"])))

    async def healthz(request: Request) -> Response:
        return _json({"status": "alive"})

    async def readyz(request: Request) -> Response:
        reason = unready()
        if reason is None:
            return _json({"status": "ready"})
        return _json({"status": "not ready", "reason": reason}, 503)

    async def metrics_text(request: Request) -> Response:
        return Response(metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    async def openapi(request: Request) -> Response:
        return _json(describe(version(DISTRIBUTION)))

    app = Starlette(
        routes=[
            Route("/v1/models", models, methods=["GET"]),
            Route("/v1/models/{model:path}", model, methods=["GET"]),
            Route("/v1/chat/completions", endpoint("/v1/chat/completions", plan_chat), methods=["POST"]),
            Route("/v1/completions", endpoint("/v1/completions", plan_completion), methods=["POST"]),
            Route("/generate", endpoint("/generate", plan_generate), methods=["POST"]),
            Route("/healthz", healthz, methods=["GET"]),
            Route("/readyz", readyz, methods=["GET"]),
            # The name that clients of vLLM and SGLang know; guidellm asks there before it begins.
            Route("/health", readyz, methods=["GET"]),
            Route("/metrics", metrics_text, methods=["GET"]),
            Route("/openapi.json", openapi, methods=["GET"]),
        ],
        exception_handlers={
            PrismError: _prism_error_response,
            HTTPException: not_found_response,
            Exception: internal_error_response,
        },
    )
    # A path with a slash too many is none of ours: told so, rather than sent elsewhere.
    app.router.redirect_slashes = False
    return app


def _prism_error_response(request: Request, error: Exception) -> Response:
    assert isinstance(error, PrismError)
    return error_response(error)


def _json(content: object, status: int = 200) -> Response:
    headers = {"retry-after": "1"} if status == 503 else {}
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")
