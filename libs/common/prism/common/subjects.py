"""Names of subjects, buckets and keys. Nobody else spells them."""

import hashlib
import re

PREFIX = "prism.v1"
BUCKET_MODELS = "prism_models"
BUCKET_ROUTES = "prism_routes"
BUCKET_LEADER = "prism_leader"
BUCKET_GPU_IDS = "prism_gpu_ids"
OBJECTS_TOKENIZERS = "prism_tokenizers"
LEADER_KEY = "global_scheduler"
FRAMES = "frames"

_SAFE = re.compile(r"[^a-z0-9_-]+")


def model_token(model: str) -> str:
    """A subject token for a model name: readable, and different for different names.

    Model names hold dots and slashes, which structure subjects; names that survive untouched stay as
    they are, all others get a short hash behind a readable form.
    """
    readable = _SAFE.sub("-", model.lower()).strip("-")[:48]
    if readable == model and readable:
        return model
    return f"{readable or 'model'}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"


def request(model: str, worker: str) -> str:
    """Where `worker` takes requests for `model`."""
    return f"{PREFIX}.request.{model_token(model)}.{worker}"


def reply(gateway: str, rid: str) -> str:
    """Where `gateway` takes the frames of `rid`."""
    return f"{PREFIX}.reply.{gateway}.{rid}"


def replies(gateway: str) -> str:
    """All frames for `gateway`."""
    return f"{PREFIX}.reply.{gateway}.>"


def reply_frames(gateway: str) -> str:
    """Where `gateway` takes frames of several requests in one message."""
    return f"{PREFIX}.reply.{gateway}.{FRAMES}"


def cancel(worker: str) -> str:
    """Where `worker` takes cancellations."""
    return f"{PREFIX}.cancel.{worker}"


def load(worker: str) -> str:
    """Load reports of `worker`; '*' for all."""
    return f"{PREFIX}.load.{worker}"


def demand(gateway: str) -> str:
    """Demand reports of `gateway`; '*' for all."""
    return f"{PREFIX}.demand.{gateway}"


def command(worker: str) -> str:
    """Where `worker` takes commands."""
    return f"{PREFIX}.command.{worker}"


def scheduler_plan(instance: str = "") -> str:
    """Where the leading global scheduler explains its plan; with `instance`, where that one does."""
    return f"{PREFIX}.scheduler.plan.{instance}" if instance else f"{PREFIX}.scheduler.plan"


def scheduler_explain(instance: str = "") -> str:
    """Where the leading global scheduler says why models are where they are; with `instance`, where that one
    does."""
    return f"{PREFIX}.scheduler.explain.{instance}" if instance else f"{PREFIX}.scheduler.explain"


def scheduler_retry(instance: str = "") -> str:
    """Where the leading global scheduler takes up failed models; with `instance`, where that one does."""
    return f"{PREFIX}.scheduler.retry.{instance}" if instance else f"{PREFIX}.scheduler.retry"


def store(node: str, verb: str) -> str:
    """Where the store of `node` answers `verb` (stage, evict, inspect, list); for `list` also a store's own
    instance in the place of its node."""
    return f"{PREFIX}.store.{node}.{verb}"


def event(kind: str, model: str) -> str:
    """Where an event of `kind` about `model` is told; an empty model is 'all'."""
    return f"{PREFIX}.event.{kind}.{model_token(model) if model else 'all'}"


def events() -> str:
    """Every event."""
    return f"{PREFIX}.event.>"


def spec_key(model: str) -> str:
    """Key of a model's spec in `prism_models`."""
    return f"spec.{model_token(model)}"


def facts_key(model: str) -> str:
    """Key of a model's facts in `prism_models`."""
    return f"facts.{model_token(model)}"


def route_key(model: str, worker: str) -> str:
    """Key of a route in `prism_routes`."""
    return f"{model_token(model)}.{worker}"


def gpu_id_key(gpu_id: int) -> str:
    """Key of the claim on a GPU id in `prism_gpu_ids`."""
    return str(gpu_id)
