"""`prism models retry`: have a failed model taken up again once what was wrong with it is mended."""

import click

from prism.cli.bus_option import run_to_exit
from prism.common import subjects
from prism.common.bus import connect_bus
from prism.common.errors import ErrorCode
from prism.common.messages.models import ModelState
from prism.common.messages.retry import RetryOutcome, RetryRequest

ANSWER_SLACK_S = 5.0


async def request_retry(nats_url: str, model: str, deadline_s: float) -> RetryOutcome:
    """Have `model` looked at again and its failure forgotten: where it stands then.

    Raises PrismError: moved when no scheduler runs, deadline_exceeded.
    """
    async with connect_bus(nats_url, name="prism models retry") as bus:
        return await bus.request(
            subjects.scheduler_retry(),
            RetryRequest(model, deadline_s),
            RetryOutcome,
            timeout_s=deadline_s + ANSWER_SLACK_S,
        )


def outcome_line(outcome: RetryOutcome) -> str:
    """What came of a retry, for people."""
    if outcome.error is not None:
        if outcome.error.code is ErrorCode.MODEL_NOT_FOUND:
            return outcome.error.message
        return f"{outcome.model} is {outcome.state}: {outcome.error.message}"
    found = ""
    if (facts := outcome.facts) is not None:
        found = f"; its folder is in order ({facts.architecture}, {facts.parameters} parameters)"
    next_step = "; the next request starts it" if outcome.state is ModelState.COLD else ""
    return f"{outcome.model} is {outcome.state}{found}{next_step}"


@click.command("retry")
@click.argument("model")
@click.option("--nats", "nats_url", help="The bus of the running system.  [default: that of `prism models`]")
@click.option(
    "--deadline-s",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="How long it may take; a model of the hub may have to be fetched first.",
)
@click.pass_obj
def retry_command(of_models: str, model: str, nats_url: str | None, deadline_s: float) -> None:
    """Take the failed MODEL up again: its folder is looked at anew, and its failures are forgotten.

    Nothing is restarted. Ends with status 1 when the model is still failed, and says why.
    """
    run_to_exit(_retry(nats_url or of_models, model, deadline_s))


async def _retry(nats_url: str, model: str, deadline_s: float) -> int:
    outcome = await request_retry(nats_url, model, deadline_s)
    click.echo(outcome_line(outcome), err=outcome.error is not None)
    return 1 if outcome.error is not None else 0
