"""A gateway on a real NATS server, a tokenizer trained on the spot, workers that follow a script."""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import httpx
import pytest
from tests.gateway.scripted_worker import Script, ScriptedWorker, Turn, scripted_worker
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from prism.cli.nats_server import NatsServer, nats_server
from prism.common import subjects
from prism.common.bus import Bus, connect_bus
from prism.common.messages.codec import encode
from prism.common.messages.models import ModelFacts, ModelSpec, TokenizerBundle
from prism.gateway.fleet import Fleet
from prism.gateway.service import Gateway, running_gateway
from prism.gateway.settings import Settings
from prism.gateway.text_tokenizer import TextTokenizer

CONTEXT_LENGTH = 200
DEADLINE_S = 10.0
LOOK_S = 0.01
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message.role) }}{% endif %}"
    "[{{ message.role }}] {{ message.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
CORPUS = [
    "Many models share few accelerators: memory moves between them, idle models sleep and wake.",
    "The quick brown fox jumps over the lazy dog, again and again, until the dog gets up.",
    "Größe, naïve café, señor, 模型 很多, память, emoji 🙂🚀 and more of them 🙂🚀.",
]


@pytest.fixture(scope="session")
def bundle() -> TokenizerBundle:
    """A byte-level BPE tokenizer with a chat template, as a model store publishes it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return TokenizerBundle(tokenizer.to_str(), CHAT_TEMPLATE, {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.fixture(scope="session")
def tokenizer(bundle: TokenizerBundle) -> TextTokenizer:
    """The same tokenizer as the gateway uses it."""
    return TextTokenizer(bundle)


class Stage:
    """A gateway with what surrounds it. `http` talks to it."""

    def __init__(
        self,
        bus: Bus,
        gateway: Gateway,
        http: httpx.AsyncClient,
        bundle: TokenizerBundle,
        stack: AsyncExitStack,
    ) -> None:
        self.bus = bus
        self.gateway = gateway
        self.http = http
        self.tokenizer = TextTokenizer(bundle)
        self._bundle = bundle
        self._stack = stack
        self._workers: set[str] = set()

    @property
    def fleet(self) -> Fleet:
        """The workers as the gateway sees them."""
        return self.gateway._fleet

    async def register(
        self,
        spec: ModelSpec | str,
        *,
        error: str | None = None,
        bundle: TokenizerBundle | None = None,
        context_length: int = CONTEXT_LENGTH,
        version: str = "",
    ) -> None:
        """Register a model as the scheduler (spec) and a model store (tokenizer, facts) do."""
        spec = ModelSpec(spec, "/nowhere") if isinstance(spec, str) else spec
        payload = encode(bundle or self._bundle)
        key = hashlib.sha256(payload).hexdigest()
        store = await self.bus.objects(subjects.OBJECTS_TOKENIZERS)
        await store.put(key, payload)
        facts = ModelFacts(
            spec.model_name,
            context_length=context_length,
            vocab_size=self.tokenizer.vocab_size,
            eos_token_ids=[1],
            tokenizer=key,
            error=error,
            version=version,
        )
        registry = await self.bus.bucket(subjects.BUCKET_MODELS)
        await registry.put(subjects.facts_key(spec.model_name), encode(facts))
        await registry.put(subjects.spec_key(spec.model_name), encode(spec))
        await self.eventually(f"/v1/models/{spec.model_name}", lambda answer: answer.status_code == 200)

    async def worker(self, script: Script, *serves: str, name: str = "worker-1") -> ScriptedWorker:
        """A worker that follows `script` and serves these models, as the gateway knows already."""
        worker = await self._stack.enter_async_context(scripted_worker(self.bus, name, script))
        others = set(self._workers)
        self._workers.add(name)
        for model in serves:
            await worker.serve(model)
            await self.ready(model)
            # Ready it may have been by another one.
            await self.until(lambda model=model: self.fleet.choose(model, others) == name)  # type: ignore[misc]
        return worker

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until `holds` of what the gateway knows, for DEADLINE_S at most."""
        async with asyncio.timeout(DEADLINE_S):
            while not holds():  # noqa: ASYNC110 (what a gateway learns makes no event for others)
                await asyncio.sleep(LOOK_S)

    async def ready(self, model: str, state: str = "ready") -> None:
        """Wait until the gateway says that `model` is ready (or in another `state`)."""
        await self.eventually(f"/v1/models/{model}", lambda answer: answer.json().get("state") == state)

    async def eventually(self, path: str, holds: Callable[[httpx.Response], bool]) -> httpx.Response:
        """GET `path` until `holds` of the answer, for DEADLINE_S at most."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            answer = await self.http.get(path)
            if holds(answer):
                return answer
            if time.monotonic() > deadline:
                raise AssertionError(f"{path} still answers {answer.status_code} {answer.text}")

    def ids(self, text: str) -> list[int]:
        """The tokens of `text`."""
        return self.tokenizer.encode(text, add_special_tokens=False)


MakeStage = Callable[[Settings], Awaitable[Stage]]


@asynccontextmanager
async def open_stage(
    bus: Bus, server: NatsServer, bundle: TokenizerBundle, settings: Settings
) -> AsyncIterator[Stage]:
    async with AsyncExitStack() as stack:
        own = await stack.enter_async_context(connect_bus(server.url, name="gateway"))
        gateway = await stack.enter_async_context(running_gateway(own, settings=settings))
        http = await stack.enter_async_context(
            httpx.AsyncClient(base_url=gateway.url, timeout=20, verify=False)
        )
        yield Stage(bus, gateway, http, bundle, stack)


@pytest.fixture
async def stage(bus: Bus, fresh_nats: NatsServer, bundle: TokenizerBundle) -> AsyncIterator[Stage]:
    """A gateway with the default settings."""
    async with open_stage(bus, fresh_nats, bundle, Settings()) as made:
        yield made


@pytest.fixture(scope="session")
async def shared_stage(
    tmp_path_factory: pytest.TempPathFactory, bundle: TokenizerBundle
) -> AsyncIterator[Stage]:
    """A gateway with a model `m` and a worker that repeats prompts, for requests that leave no trace."""

    async def echo(turn: Turn) -> None:
        await turn.send(turn.request.input_ids, finish="stop")

    with nats_server(tmp_path_factory.mktemp("gateway-nats")) as server:
        async with (
            connect_bus(server.url, name="test") as bus,
            open_stage(bus, server, bundle, Settings()) as made,
        ):
            await made.register("m")
            await made.worker(echo, "m")
            yield made


@pytest.fixture
async def make_stage(bus: Bus, fresh_nats: NatsServer, bundle: TokenizerBundle) -> AsyncIterator[MakeStage]:
    """Makes a gateway with settings of the test's own."""
    async with AsyncExitStack() as stack:

        async def make(settings: Settings) -> Stage:
            return await stack.enter_async_context(open_stage(bus, fresh_nats, bundle, settings))

        yield make
