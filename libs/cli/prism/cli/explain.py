"""`prism explain [MODEL]`: why a model is where it is, in the scheduler's own words."""

import click

from prism.cli.bus_option import json_option, nats_option, run_to_exit
from prism.cli.system_view import inspected_bus
from prism.cli.table import aligned, megabytes, seconds
from prism.common import subjects
from prism.common.errors import PrismError
from prism.common.messages.codec import encode
from prism.common.messages.explain import ExplainedPlace, ExplainReply, ExplainRequest, ModelExplanation

DEADLINE_S = 5.0


def explanation_lines(reply: ExplainReply) -> list[str]:
    """The report of one model in full, or of several in a table."""
    if len(reply.models) == 1 and reply.models[0].places:
        return _in_full(reply, reply.models[0])
    rows = [
        (
            one.model,
            one.summary,
            f"{one.arrivals_per_s:.2f}",
            seconds(one.last_arrival_s) if one.last_arrival_s is not None else "-",
            f"{100 * one.chance_to_return:.0f} %",
            "; ".join((*one.notes, *one.next)),
        )
        for one in reply.models
    ]
    header = ("model", "where", "requests/s", "last", "chance to return", "next")
    return aligned(header, rows, right=(2, 3, 4))


def _in_full(reply: ExplainReply, one: ModelExplanation) -> list[str]:
    last = (
        f"the last {seconds(one.last_arrival_s)} ago" if one.last_arrival_s is not None else "none seen yet"
    )
    lines = [
        f"{one.model}: {one.summary} (policy {reply.policy}, {reply.instance})",
        f"asked for: {one.arrivals_per_s:.2f} requests/s, {one.prompt_tokens_per_s:.0f} prompt and "
        f"{one.output_tokens_per_s:.0f} output tokens/s; {last}; chance to be asked for within 30 s: "
        f"{100 * one.chance_to_return:.0f} %",
    ]
    if one.parked:
        lines.append(f"waiting: {one.parked} requests, {seconds(one.oldest_parked_s)} the oldest")
    lines += [f"next: {told}" for told in one.next]
    lines += [f"note: {text}" for text in one.notes]
    lines += [
        f"{seconds(action.ago_s)} ago: {action.kind} on {action.worker}: {action.reason}"
        + (f" -> {action.outcome}" if action.outcome else "")
        for action in one.decided
    ]
    header = ("place", "verdict", "pressure", "with it", "waits", "free", "needs", "why")
    return [*lines, "", *aligned(header, [_row(place) for place in one.places], right=(2, 3, 4, 5, 6))]


def _row(place: ExplainedPlace) -> tuple[str, ...]:
    why = place.why + (f" ({', '.join(place.sleeps)})" if place.sleeps else "")
    return (
        f"{place.worker}[{','.join(map(str, place.gpu_ids))}]",
        place.verdict,
        f"{place.pressure:.2f}",
        f"{place.pressure_with:.2f}",
        seconds(place.seconds) if place.seconds is not None else "-",
        megabytes(place.free_bytes),
        megabytes(place.need_bytes),
        why,
    )


async def _show(nats_url: str, model: str, as_json: bool) -> int:
    async with inspected_bus(nats_url) as bus:
        subject = subjects.scheduler_explain()
        reply = await bus.request(subject, ExplainRequest(model), ExplainReply, timeout_s=DEADLINE_S)
    if as_json:
        click.echo(encode(reply).decode())
    if reply.error is not None:
        raise PrismError.from_body(reply.error)
    if not as_json:
        click.echo("\n".join(explanation_lines(reply)))
    return 0


@click.command("explain")
@click.argument("model", default="")
@nats_option
@json_option
def explain_command(model: str, nats_url: str, as_json: bool) -> None:
    """Say why MODEL is where it is: what it was asked for, what each place would mean for it, what was
    decided and why not otherwise. Without MODEL, all of them in brief.
    """
    run_to_exit(_show(nats_url, model, as_json))
