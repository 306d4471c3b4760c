"""`prism calibrate`: measure a running system, and write what its device and models cost."""

import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import httpx

from prism.bench.calibration.probing import DEADLINE_S
from prism.bench.calibration.rounds import Rounds, served_contexts
from prism.bench.simulation.model_config import read_model_facts
from prism.bench.simulation.options import clean_end
from prism.bench.simulation.profiles import read_profile, write_profile
from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.models import ModelSpec
from prism.common.placement_file import read_placement_file
from prism.scheduling.cost import GpuProfile, ModelCost
from prism.scheduling.profiles import profile_names

ROUNDS = 5
SERVED_S = 60.0


async def calibrate(
    url: str,
    specs: Sequence[ModelSpec],
    base: GpuProfile,
    *,
    name: str,
    element_bytes: int | None,
    pass_tokens: int,
    tell: Callable[[str], None],
) -> tuple[GpuProfile, dict[str, ModelCost]]:
    """Measure `specs`, which the system at `url` serves and nobody else uses meanwhile, in ROUNDS, between
    which a workload is served, SERVED_S in all; its engines prefill `pass_tokens` at once. Raises PrismError
    for a model that is not served or does not answer."""
    async with httpx.AsyncClient(base_url=url, timeout=DEADLINE_S) as client:
        contexts = await served_contexts(client, [spec.model_name for spec in specs])
        facts = {spec.model_name: read_model_facts(spec.model_name, spec.model_path) for spec in specs}
        rounds = Rounds(
            client, contexts, facts, base, pass_tokens=pass_tokens, element_bytes=element_bytes, tell=tell
        )
        for _ in range(ROUNDS):
            await rounds.measure(1)
            await rounds.serve(SERVED_S / ROUNDS)
    return rounds.fitted(name)


@click.command("calibrate")
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="A gateway of the system.")
@click.option(
    "--models", type=click.Path(path_type=Path), required=True, help="The placement file that it serves."
)
@click.option("--model", "names", multiple=True, help="Only these of its models.  [default: all]")
@click.option(
    "--base",
    default="h200",
    show_default=True,
    help=f"Where what is not measured is taken from: {', '.join(profile_names())}, or a file.",
)
@click.option(
    "--element-bytes", type=click.IntRange(1, 8), help="Of a weight, where not the checkpoint's own."
)
@click.option(
    "--pass-tokens",
    type=click.IntRange(min=64),
    default=2048,
    show_default=True,
    help="The workers' --chunked-prefill-tokens: 2048 on GPUs, 512 on CPUs unless they were told otherwise.",
)
@click.option("--name", default="calibrated", show_default=True, help="What to call the profile.")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The profile to write."
)
def calibrate_command(
    url: str,
    models: Path,
    names: tuple[str, ...],
    base: str,
    element_bytes: int | None,
    pass_tokens: int,
    name: str,
    out: Path,
) -> None:
    """Measure a running system through its gateway, and write a cost profile for `prism simulate --profile`.

    Nobody else should use the system meanwhile: what is measured is the time of single requests, of batches,
    of models that decode at once, and of a minute's requests for all of them. All of them should be on one
    GPU: of a system with several, measure the models of each by themselves (--model).
    """
    with clean_end():
        if not os.access(out if out.exists() else out.parent, os.W_OK):
            raise PrismError(ErrorCode.INVALID_REQUEST, f"{out} cannot be written: choose another --out")
        specs = read_placement_file(models)
        known = {spec.model_name for spec in specs}
        unknown = sorted(set(names) - known)
        if unknown:
            raise PrismError(ErrorCode.INVALID_REQUEST, f"{models} has no model {', '.join(unknown)}")
        chosen = [spec for spec in specs if not names or spec.model_name in names]
        wide = [spec.model_name for spec in chosen if spec.tp_size > 1]
        if wide:
            raise PrismError(
                ErrorCode.INVALID_REQUEST,
                f"{', '.join(wide)}: on several GPUs each (tp_size), and costs are those of one; "
                "name the others with --model",
            )
        profile, costs = asyncio.run(
            calibrate(
                url,
                chosen,
                read_profile(base),
                name=name,
                element_bytes=element_bytes,
                pass_tokens=pass_tokens,
                tell=lambda line: click.echo(line, err=True),
            )
        )
        try:
            write_profile(profile, out, costs)
        except OSError as error:
            raise PrismError(ErrorCode.INVALID_REQUEST, f"{out}: {error.strerror}") from error
    for model, cost in costs.items():
        click.echo(
            f"{model}: first token {1e3 * (cost.request_s + cost.prefill_fixed_s):.1f} ms + "
            f"{1e6 * cost.prefill_token_s:.0f} us a token, step {1e3 * cost.decode_fixed_s:.1f} ms + "
            f"{1e3 * cost.decode_sequence_s:.2f} ms a sequence"
        )
    click.echo(f"{out}: {profile.source}")
    sys.exit(0)
