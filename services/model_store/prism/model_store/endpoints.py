"""The store on the bus: stage, evict, inspect and list, as a NATS micro service."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

import nats.errors
from nats.micro.request import Request

from prism.common import subjects
from prism.common.bus import Bus
from prism.common.errors import ErrorBody, ErrorCode, PrismError
from prism.common.messages.codec import decode, encode
from prism.common.messages.models import ModelSpec
from prism.common.messages.store import StoreInspection, StoreModelOutcome, StoreModelRequest
from prism.common.micro import micro_service
from prism.common.telemetry import about
from prism.model_store.inspection import Inspector
from prism.model_store.store import ModelStore

log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def serve_endpoints(
    bus: Bus, store: ModelStore, inspector: Inspector, specs: Mapping[str, ModelSpec], instance: str
) -> AsyncIterator[None]:
    """Answer on the subjects of the store's node until the end of the `async with`. A request without a
    path is for a model in `specs` (by their keys in `prism_models`)."""

    async def stage(request: StoreModelRequest) -> StoreModelOutcome:
        began = asyncio.get_running_loop().time()
        path = request.model_path or _spec(specs, request.model).model_path
        nbytes = await store.prefetch(request.model, path)
        seconds = asyncio.get_running_loop().time() - began
        return StoreModelOutcome(request.model, nbytes, seconds)

    async def evict(request: StoreModelRequest) -> StoreModelOutcome:
        return StoreModelOutcome(request.model, store.evict(request.model))

    tasks: set[asyncio.Task[None]] = set()

    def tracked(act: Callable[[Request], Awaitable[None]]) -> Callable[[Request], Awaitable[None]]:
        # Handlers of one subscription run one after the other, and staging takes long.
        async def start(request: Request) -> None:
            task = asyncio.ensure_future(act(request))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        return start

    def on_model(
        act: Callable[[StoreModelRequest], Awaitable[StoreModelOutcome]],
    ) -> Callable[[Request], Awaitable[None]]:
        async def handle(request: Request) -> None:
            await _respond(request, await _outcome(request, act))

        return tracked(handle)

    async def inspect(request: Request) -> None:
        await _respond(request, await _inspection(request, inspector, specs))

    async def listing(request: Request) -> None:
        await _respond(request, store.report())

    handlers = {
        "stage": on_model(stage),
        "evict": on_model(evict),
        "inspect": tracked(inspect),
        "list": listing,
    }
    try:
        async with micro_service(
            bus,
            "prism-model-store",
            instance=instance,
            description="Stages weights in shared memory",
            metadata={
                "node": store.node,
                "memory_gb": f"{store.table.budget_bytes / 1e9:g}",
                "image_dir": str(store.disk.root),
            },
            endpoints={
                **{verb: (subjects.store(store.node, verb), handler) for verb, handler in handlers.items()},
                # Where a node has several stores, any of them answers for the node, and each for itself.
                "list-of": (subjects.store(instance, "list"), listing),
            },
        ):
            yield
    finally:
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _outcome(
    request: Request, act: Callable[[StoreModelRequest], Awaitable[StoreModelOutcome]]
) -> StoreModelOutcome:
    model = ""
    try:
        message = decode(request.data, StoreModelRequest)
        model = message.model
        return await act(message)
    except PrismError as error:
        log.info("%s refused: %s", request.subject, error, extra=about(model=model))
        return StoreModelOutcome(model, error=error.body)
    except Exception as error:
        log.exception("%s failed", request.subject, extra=about(model=model))
        return StoreModelOutcome(model, error=ErrorBody(ErrorCode.INTERNAL, repr(error)))


async def _inspection(
    request: Request, inspector: Inspector, specs: Mapping[str, ModelSpec]
) -> StoreInspection:
    try:
        model = decode(request.data, StoreModelRequest).model
        return StoreInspection(await inspector.look_now(_spec(specs, model)))
    except PrismError as error:
        log.info("%s refused: %s", request.subject, error)
        return StoreInspection(error=error.body)
    except Exception as error:
        log.exception("%s failed", request.subject)
        return StoreInspection(error=ErrorBody(ErrorCode.INTERNAL, repr(error)))


async def _respond(request: Request, answer: object) -> None:
    try:
        await request.respond(encode(answer))
    except (nats.errors.Error, OSError) as error:
        log.warning("answer on %s not sent: %s", request.subject, error)


def _spec(specs: Mapping[str, ModelSpec], model: str) -> ModelSpec:
    spec = specs.get(subjects.spec_key(model))
    if spec is None:
        raise PrismError(
            ErrorCode.MODEL_NOT_FOUND,
            f"{model} is not registered; register it, or name its folder in model_path",
        )
    return spec
