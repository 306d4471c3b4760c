"""What one HTTP request comes to: generations to run, and the form in which their results are told."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
from starlette.datastructures import Headers

from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.generation import SamplingParams
from prism.common.messages.models import ModelFacts, ModelSpec
from prism.gateway.dispatch import Job
from prism.gateway.registry import Registry
from prism.gateway.request_fields import invalid
from prism.gateway.sampling import SEED_SPACE, SamplingFields, build_sampling, first_seed, room_for_output
from prism.gateway.settings import Settings
from prism.gateway.slo_headers import TPOT_HEADER, TTFT_HEADER, read_objective
from prism.gateway.text_assembler import Ending, Piece, TokenScore
from prism.gateway.text_tokenizer import TextTokenizer
from prism.gateway.tokenizer_cache import TokenizerCache

LONG_TEXT = 8192
"""Characters from which on encoding takes long enough (a millisecond) to be done off the event loop."""


@dataclass(frozen=True, slots=True)
class Servable:
    """A model with all that is needed to talk to it, for one request and until its `deadline`."""

    spec: ModelSpec
    facts: ModelFacts
    tokenizer: TextTokenizer
    deadline: float

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self.facts.vocab_size or self.tokenizer.vocab_size

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """The token ids of each text. Raises PrismError(deadline_exceeded)."""

        def encode_all() -> list[list[int]]:
            return [self.tokenizer.encode(text, add_special_tokens=add_special_tokens) for text in texts]

        if sum(map(len, texts)) > LONG_TEXT:
            async with _before(self.deadline, "its prompt was tokenised"):
                return await asyncio.to_thread(encode_all)
        return encode_all()


@asynccontextmanager
async def _before(deadline: float, what: str) -> AsyncIterator[None]:
    """Raises PrismError(deadline_exceeded) when `what`, to be done by the block, is not by `deadline`."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError:
        raise PrismError(
            ErrorCode.DEADLINE_EXCEEDED, f"the request's deadline passed before {what}", retry=True
        ) from None


@dataclass(slots=True)
class Choice:
    """What has come of one generation. `prompt` counts the request's prompts from 0."""

    job: Job
    prompt: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    ending: Ending | None = None

    def add(self, piece: Piece) -> None:
        """Take a piece in."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.scores += piece.scores
        self.ending = piece.ending


class Usage(msgspec.Struct, frozen=True, omit_defaults=True):
    """Tokens as OpenAI counts them: each prompt once, however many choices it has.

    The details are None until the worker has told how many tokens of the prompt it had cached.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] | None = None


def count_usage(choices: Sequence[Choice]) -> Usage:
    """What `choices` used."""
    prompts = {choice.prompt: len(choice.job.input_ids) for choice in choices}
    cached: dict[int, int] = {}
    for choice in choices:
        if choice.ending is not None:
            here = min(choice.ending.cached_tokens, prompts[choice.prompt])
            cached[choice.prompt] = max(cached.get(choice.prompt, 0), here)
    prompt_tokens = sum(prompts.values())
    completion_tokens = sum(len(choice.tokens) for choice in choices)
    return Usage(
        prompt_tokens,
        completion_tokens,
        prompt_tokens + completion_tokens,
        {"cached_tokens": sum(cached.values())},
    )


class Answer(Protocol):
    """The form of an answer. Whatever these return goes out as JSON; bytes are JSON already."""

    repeats: bool
    """Whether an event of a choice tells all that the ones before it have told."""

    def opening(self, choices: Sequence[Choice]) -> list[object]:
        """Events at the start of a stream."""

    def events(self, index: int, choice: Choice, piece: Piece) -> list[object]:
        """Events for a `piece` that has just been added to the choice `index`."""

    def closing(self, choices: Sequence[Choice]) -> list[object]:
        """Events at the end, before [DONE]."""

    def whole(self, choices: Sequence[Choice]) -> object:
        """The answer without streaming."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Run `choices`, cut them at `stops`, tell them as `answer` says. `request` is the id that the client
    sees. Texts of one that `continues` go on from that of their prompt: a space between the two is theirs."""

    request: str
    model: Servable
    choices: list[Choice]
    stops: tuple[str, ...]
    stream: bool
    answer: Answer
    continues: bool = False


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request asks of each of its generations. `max_tokens` None: all that the context has room for.
    `prompt_param` names the prompt in messages to the client, `request` is the id that the client sees.
    `streamed`: each token matters when it comes, to the client or to what looks for stop strings."""

    request: str
    fields: SamplingFields
    prompt_param: str
    streamed: bool
    max_tokens: int | None
    min_tokens: int | None = None
    n: int = 1
    seed: int | None = None
    logit_bias: dict[str, float] | None = None
    top_logprobs: int | None = None
    ttft_slo_ms: float | None = None


class Planner:
    """What the endpoints need to turn one request into a plan. `clock` is the event loop's; the request came
    when this was made, and its deadline counts from then, all that a plan waits for included."""

    def __init__(
        self, registry: Registry, tokenizers: TokenizerCache, settings: Settings, clock: Callable[[], float]
    ) -> None:
        self.registry = registry
        self.clock = clock
        self.arrived = clock()
        self.deadline = self.arrived + settings.deadline_s
        self._tokenizers = tokenizers
        self._settings = settings

    async def servable(self, name: str) -> Servable:
        """The model `name`. Raises PrismError when there is none, it cannot be served, or its tokenizer does
        not come before the deadline."""
        spec = self.registry.spec(name)
        facts = self.registry.facts(name)
        async with _before(self.deadline, f"the tokenizer of {name!r} was there"):
            tokenizer = await self._tokenizers.get(facts.tokenizer)
        return Servable(spec, facts, tokenizer, self.deadline)

    def choices(
        self, model: Servable, prompts: Sequence[list[int]], wanted: Wanted, headers: Headers
    ) -> list[Choice]:
        """`wanted.n` choices of each prompt, seeds counting up from the first.

        Raises PrismError: invalid_request, context_length_exceeded.
        """
        if len(prompts) * wanted.n > self._settings.max_choices:
            raise invalid(
                "n",
                f"{len(prompts)} prompts with n={wanted.n} are {len(prompts) * wanted.n} generations; "
                f"at most {self._settings.max_choices} are allowed in one request",
            )
        told = read_objective(headers, TTFT_HEADER)
        ttft = wanted.ttft_slo_ms or told or model.spec.ttft_slo_ms
        tpot = read_objective(headers, TPOT_HEADER) or model.spec.tpot_slo_ms
        seed = first_seed(wanted.seed)
        choices = []
        for index, prompt in enumerate(prompts):
            sampling = self._sampling(model, prompt, wanted)
            for copy in range(wanted.n):
                job = Job(
                    model=model.spec.model_name,
                    input_ids=prompt,
                    sampling=msgspec.structs.replace(sampling, seed=(seed + copy) % SEED_SPACE),
                    deadline=self.deadline,
                    eos_token_ids=frozenset(model.facts.eos_token_ids),
                    top_logprobs=wanted.top_logprobs,
                    ttft_slo_ms=ttft,
                    tpot_slo_ms=tpot,
                    priority=model.spec.priority,
                    request=wanted.request,
                    streamed=wanted.streamed,
                    version=model.facts.version,
                )
                choices.append(Choice(job, index))
        return choices

    def _sampling(self, model: Servable, prompt: list[int], wanted: Wanted) -> SamplingParams:
        if not prompt:
            raise invalid(wanted.prompt_param, f"{wanted.prompt_param} holds no token: it must not be empty")
        room = room_for_output(len(prompt), model.facts.context_length, wanted.prompt_param)
        return build_sampling(
            wanted.fields,
            max_tokens=min(room, wanted.max_tokens or room),
            min_tokens=wanted.min_tokens,
            seed=0,
            vocab_size=model.vocab_size,
            logit_bias=wanted.logit_bias,
        )
