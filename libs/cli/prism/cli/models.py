"""`prism models`: every model of a running system, where it is and how it does; and `retry`."""

import click
import msgspec

from prism.cli.bus_option import json_option, nats_option, run_to_exit
from prism.cli.retry import retry_command
from prism.cli.system_view import SystemView, inspected_bus, look
from prism.cli.table import aligned, megabytes, seconds
from prism.common.messages.models import ModelState


class ModelRow(msgspec.Struct, frozen=True, omit_defaults=True):
    """One model on one worker, or on none (`worker` empty, state cold or failed). Bytes of the device's
    memory, of a model on its way up what is reserved; `parked` counts requests that wait at gateways; `note`
    says why it isn't where it should be."""

    model: str
    state: ModelState
    worker: str = ""
    routed: bool = False
    state_s: float = 0.0
    weights_bytes: int = 0
    kv_used_bytes: int = 0
    kv_quota_bytes: int = 0
    running: int = 0
    queued: int = 0
    parked: int = 0
    note: str = ""


def model_rows(view: SystemView) -> list[ModelRow]:
    """All registered models in the order of names, one row for each worker that has the model."""
    rows = []
    plan = view.plan
    notes = {note.model: note.text for note in plan.notes} if plan else {}
    parked = {demand.model: demand.parked for demand in plan.demand} if plan else {}
    routed = {(route.model, route.worker) for route in view.routes}
    for spec in view.specs:
        name = spec.model_name
        facts = view.facts.get(name)
        told = notes.get(name, "")
        if facts is None:
            told = "no model store has read its folder yet"
        elif facts.error is not None:
            told = facts.error
        there = [
            (worker.worker, load) for worker in view.workers for load in worker.models if load.model == name
        ]
        if not there:
            state = ModelState.FAILED if facts is not None and facts.error is not None else ModelState.COLD
            rows.append(ModelRow(name, state, parked=parked.get(name, 0), note=told))
        for worker, load in there:
            rows.append(
                ModelRow(
                    name,
                    load.state,
                    worker,
                    (name, worker) in routed,
                    load.state_s,
                    load.weights_bytes,
                    load.kv_used_bytes,
                    load.kv_quota_bytes,
                    load.running,
                    load.queued,
                    parked.get(name, 0),
                    load.failure if load.failure and load.state is ModelState.FAILED else told,
                )
            )
    return rows


def model_lines(rows: list[ModelRow]) -> list[str]:
    """The table of `prism models`."""
    header = (
        "model",
        "state",
        "since",
        "worker",
        "weights",
        "kv used",
        "kv quota",
        "running",
        "queued",
        "parked",
    )
    cells = [
        (
            row.model,
            row.state.value,
            seconds(row.state_s) if row.worker else "-",
            row.worker or "-",
            megabytes(row.weights_bytes),
            megabytes(row.kv_used_bytes),
            megabytes(row.kv_quota_bytes),
            str(row.running),
            str(row.queued),
            str(row.parked),
            row.note,
        )
        for row in rows
    ]
    return aligned((*header, "note"), cells, right=(2, 4, 5, 6, 7, 8, 9))


async def _show(nats_url: str, as_json: bool) -> int:
    async with inspected_bus(nats_url) as bus:
        rows = model_rows(await look(bus))
    lines = [msgspec.json.encode(row).decode() for row in rows] if as_json else model_lines(rows)
    click.echo("\n".join(lines))
    return 0


@click.group("models", invoke_without_command=True)
@nats_option
@json_option
@click.pass_context
def models_command(context: click.Context, nats_url: str, as_json: bool) -> None:
    """List the models of a running system: state, worker, memory, requests."""
    context.obj = nats_url
    if context.invoked_subcommand is None:
        run_to_exit(_show(nats_url, as_json))


models_command.add_command(retry_command)
