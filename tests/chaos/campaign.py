"""Faults one after the other under steady traffic, and what became of every request."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

import httpx
from tests.chaos.faults import Fault
from tests.chaos.stage import OF_EACH, Stage
from tests.chaos.traffic import COMPLETE, DOUBLED, LOST, WRONG, Exchange, Question, Traffic, traffic

from prism.cli.tiny_check import CHECKED_STEPS

CLIENTS = 8
BEFORE = 6
AFTER = 12
RECOVERY_DEADLINE_S = 90.0
ANSWER_DEADLINE_S = 120.0


@dataclass
class FaultReport:
    """What one fault did. Times in seconds; `wrong_after` is what was not right again by then. Connections
    that no gateway took are `refused`, those that ended before their answer was whole `broken`, which only
    some faults may do to them."""

    fault: str
    requests: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    refused: int = 0
    broken: int = 0
    may_break: bool = False
    worst_stall_s: float = 0.0
    recovered_s: float = 0.0
    wrong_after: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether no client could have noticed, but those whose gateway it was that died."""
        return not (self.lost or self.doubled or self.wrong or self.broken_without_cause or self.wrong_after)

    @property
    def broken_without_cause(self) -> int:
        """Connections that broke although their gateway lived."""
        return 0 if self.may_break else self.broken


async def learn_answers(gateway: str, prompts: dict[str, list[list[int]]]) -> list[Question]:
    """Ask each prompt of each model once, undisturbed; the answers are what all later ones must equal."""
    questions = []
    async with httpx.AsyncClient(base_url=gateway, timeout=ANSWER_DEADLINE_S) as client:
        for model, each in prompts.items():
            for prompt in each:
                body = {
                    "model": model,
                    "input_ids": prompt,
                    "sampling_params": {"temperature": 0, "max_new_tokens": CHECKED_STEPS},
                }
                response = await client.post("/generate", json=body)
                response.raise_for_status()
                questions.append(Question(model, prompt, response.json()["output_ids"]))
    return questions


async def run_campaign(
    stage: Stage,
    faults: Sequence[Fault],
    questions: list[Question],
    *,
    seed: int,
    before_fault: Callable[[], None] = lambda: None,
    on_report: Callable[[FaultReport], None] = lambda report: None,
) -> list[FaultReport]:
    """Do each fault under traffic, wait until all is right again, and account for every request.

    `before_fault` is called right before each fault, while all that it may end is still there.
    """
    reports = []
    for fault in faults:
        chance = Random(f"{seed}/{fault.name}")
        report = FaultReport(fault.name, may_break=fault.breaks_streams)
        async with traffic(stage.gateways, questions, clients=CLIENTS, seed=chance.randrange(2**31)) as flow:
            await flow.more(BEFORE, ANSWER_DEADLINE_S)
            began = time.monotonic()
            before_fault()
            await fault.do(stage, chance)
            await flow.more(AFTER, ANSWER_DEADLINE_S)
            report.wrong_after = await stage.view.until_right(OF_EACH, RECOVERY_DEADLINE_S)
            report.recovered_s = time.monotonic() - began
        report.wrong_after += await _unanswered(stage, questions)
        _account(report, flow.exchanges)
        on_report(report)
        reports.append(report)
    return reports


async def _unanswered(stage: Stage, questions: list[Question]) -> list[str]:
    """Each model is asked through each gateway: what does not answer as it should."""
    wrong = []
    for gateway in stage.gateways():
        probe = Traffic(lambda gateway=gateway: [gateway], questions, 0)  # type: ignore[misc]
        for question in {question.model: question for question in questions}.values():
            exchange = await probe.ask(question, Random(0))
            if exchange.outcome != COMPLETE or exchange.refused or exchange.breaks:
                said = "; ".join([exchange.outcome, exchange.detail, *exchange.breaks])
                wrong.append(f"{question.model} through {gateway}: {said}")
    return wrong


def _account(report: FaultReport, exchanges: list[Exchange]) -> None:
    outcomes = Counter(exchange.outcome for exchange in exchanges)
    report.requests = len(exchanges)
    report.lost, report.doubled, report.wrong = outcomes[LOST], outcomes[DOUBLED], outcomes[WRONG]
    report.refused = sum(exchange.refused for exchange in exchanges)
    report.broken = sum(len(exchange.breaks) for exchange in exchanges)
    report.worst_stall_s = max((exchange.stall_s for exchange in exchanges), default=0.0)
    report.details = [exchange.detail for exchange in exchanges if exchange.outcome != COMPLETE]
    report.details += [line for exchange in exchanges for line in exchange.breaks]
