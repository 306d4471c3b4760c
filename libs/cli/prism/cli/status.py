"""`prism status`: who is there, who leads, what memory is taken, what was decided last."""

from collections import Counter

import click
import msgspec

from prism.cli.bus_option import json_option, nats_option, run_to_exit
from prism.cli.system_view import SystemView, inspected_bus, look
from prism.cli.table import aligned, megabytes, seconds
from prism.common.messages.explain import PlanReport
from prism.common.messages.load import LoadReport

LAST_ACTIONS = 5


def status_lines(view: SystemView) -> list[str]:
    """The report of `prism status`."""
    sections = [[f"bus: {view.nats}", *_services(view)]]
    if view.workers:
        sections.append(_workers(view.workers))
    if view.stores:
        sections.append(_stores(view))
    if view.plan is not None:
        sections.append(_plan(view.plan))
    problems = view.problems()
    sections.append([f"problem: {problem}" for problem in problems] or ["all four services answer"])
    return "\n\n".join("\n".join(section) for section in sections).splitlines()


def _services(view: SystemView) -> list[str]:
    def others(metadata: dict[str, str]) -> str:
        shown = dict(metadata)
        if shown.get("host") == shown.get("node"):
            shown.pop("host", None)
        return " ".join(f"{key}={value}" for key, value in shown.items() if key not in ("node", "pid"))

    return aligned(
        ("service", "instance", "node", "pid", "says"),
        [
            (
                service.role,
                service.instance,
                service.metadata.get("node", "-"),
                service.metadata.get("pid", "-"),
                others(service.metadata),
            )
            for service in view.services
        ],
        right=(3,),
    )


def _workers(workers: list[LoadReport]) -> list[str]:
    rows = []
    for worker in workers:
        states = Counter(model.state.value for model in worker.models)
        name = worker.worker + (" (draining)" if worker.draining else "")
        name += "" if worker.ready else " (not ready yet)"
        rows.append(
            (
                name,
                worker.device,
                ",".join(map(str, worker.gpu_ids)),
                f"{megabytes(worker.memory_reserved_bytes)} of {megabytes(worker.memory_limit_bytes)}",
                str(sum(model.running for model in worker.models)),
                str(sum(model.queued for model in worker.models)),
                ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "none",
            )
        )
    header = ("worker", "device", "gpu ids", "memory", "running", "queued", "models")
    return aligned(header, rows, right=(3, 4, 5))


def _stores(view: SystemView) -> list[str]:
    rows = [
        (
            instance,
            store.node,
            f"{megabytes(store.used_bytes)} of {megabytes(store.budget_bytes)}",
            str(len(store.images)),
            str(sum(image.leases for image in store.images)),
        )
        for instance, store in view.stores.items()
    ]
    return aligned(("store", "node", "memory", "images", "leases"), rows, right=(2, 3, 4))


def _plan(plan: PlanReport) -> list[str]:
    lines = [f"scheduler: {plan.leader or 'nobody'} leads, epoch {plan.epoch}, policy {plan.policy}"]
    lines += [
        f"waiting: {demand.parked} requests for {demand.model}, {seconds(demand.oldest_parked_s)} the oldest"
        for demand in plan.demand
        if demand.parked
    ]
    lines += [f"note: {note.model} {note.text}" for note in plan.notes]
    lines += [
        f"{seconds(action.ago_s)} ago: {action.kind} {action.model} on {action.worker}: {action.reason}"
        + (f" -> {action.outcome}" if action.outcome else "")
        for action in plan.actions[-LAST_ACTIONS:]
    ]
    return lines


async def _show(nats_url: str, as_json: bool) -> int:
    async with inspected_bus(nats_url) as bus:
        view = await look(bus)
    if as_json:
        click.echo(msgspec.json.encode({**msgspec.to_builtins(view), "problems": view.problems()}).decode())
    else:
        click.echo("\n".join(status_lines(view)))
    return 1 if view.problems() else 0


@click.command("status")
@nats_option
@json_option
def status_command(nats_url: str, as_json: bool) -> None:
    """Show the services of a running system, their memory and what the scheduler decided last.

    Ends with status 1 when a service is missing, nobody leads, or a worker is silent.
    """
    run_to_exit(_show(nats_url, as_json))
