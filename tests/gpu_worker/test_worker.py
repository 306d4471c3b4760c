"""A worker with real engines, a real model store and a real NATS server, told what a scheduler would."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import psutil
import pytest
from nats.js.errors import KeyNotFoundError
from tests.gpu_worker.worker_rig import (
    DEADLINE_S,
    KV_BYTES,
    SMALL,
    Rig,
    last_error,
    send,
    store_process,
    tokens_of,
    worker_rig,
)

from prism.cli.nats_server import NatsServer
from prism.common import subjects
from prism.common.errors import ErrorCode
from prism.common.messages.codec import decode, encode
from prism.common.messages.generation import CancelRequest, SamplingParams
from prism.common.messages.models import ModelState
from prism.common.messages.placement import CommandKind, CommandOutcome, Route
from prism.common.mirror import mirror_bucket
from prism.gpu_worker.shells import ForkServerShells

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
async def store(session_nats: NatsServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Path]:
    async with store_process(session_nats, tmp_path_factory.mktemp("store")) as socket:
        yield socket


@pytest.fixture
async def impatient_rig(
    session_nats: NatsServer, store: Path, shells: ForkServerShells, tiny_models: dict[str, Path]
) -> AsyncIterator[Rig]:
    """Its engines count as stuck soon."""
    async with worker_rig(session_nats, store, shells, tiny_models, stall_s=3.0) as ready:
        yield ready


@pytest.fixture
async def rig(
    session_nats: NatsServer, store: Path, shells: ForkServerShells, tiny_models: dict[str, Path]
) -> AsyncIterator[Rig]:
    async with worker_rig(session_nats, store, shells, tiny_models) as ready:
        yield ready


@pytest.mark.core
async def test_a_model_is_started_serves_dozes_wakes_and_is_released(rig: Rig) -> None:
    outcome = await rig.command(CommandKind.ACTIVATE)
    assert outcome.error is None
    assert outcome.state is ModelState.ACTIVE
    weights = rig.load().weights_bytes
    assert weights >= 24_000_000
    routes = await rig.bus.bucket(subjects.BUCKET_ROUTES)
    entry = await routes.get(subjects.route_key(SMALL, rig.id))
    assert decode(entry.value or b"", Route) == Route(SMALL, rig.id, "node")

    first = await (await send(rig, "a", [5, 6, 7], 12)).all()
    assert len(tokens_of(first)) == 12
    assert first[-1].finish is not None
    assert first[-1].finish.reason == "length"
    assert (first[-1].finish.prompt_tokens, first[-1].finish.completion_tokens) == (3, 12)
    assert rig.load().kv_used_bytes > 0

    outcome = await rig.command(CommandKind.DOZE)
    assert outcome.error is None
    assert outcome.state is ModelState.DOZING
    assert (rig.load().weights_bytes, rig.load().kv_used_bytes) == (0, 0)
    assert rig.worker.ledger.reserved_bytes == 0
    assert await (await send(rig, "b", [5, 6, 7], 12)).next() is None

    outcome = await rig.command(CommandKind.ACTIVATE)
    assert outcome.state is ModelState.ACTIVE
    assert rig.load().weights_bytes == weights
    assert tokens_of(await (await send(rig, "c", [5, 6, 7], 12)).all()) == tokens_of(first)

    outcome = await rig.command(CommandKind.RELEASE)
    assert outcome.state is ModelState.COLD
    assert rig.worker.ledger.reserved_bytes == 0


async def test_its_load_report_tells_what_it_can_do_and_what_a_model_could_give_away(rig: Rig) -> None:
    report = rig.worker.load_report()
    assert (report.profile, report.elastic, report.freezes, report.fixed_bytes) == ("cpu", True, False, 0)
    assert report.tp_sizes[:2] == [1, 2]
    await rig.command(CommandKind.ACTIVATE)
    load, holder = rig.load(), rig.worker.instances[SMALL].quota_holder()
    assert holder is not None
    assert load.kv_spare_bytes == holder.spare_bytes == KV_BYTES, "its floor is nothing: the facts have no KV"
    frames = await send(rig, "a", [5, 6, 7], 1500)
    assert await frames.next() is not None
    assert 0 <= rig.load().kv_spare_bytes < rig.load().kv_quota_bytes
    await rig.bus.publish(subjects.cancel(rig.id), CancelRequest("a".ljust(32, "0")))
    await last_error(frames)
    await rig.command(CommandKind.DOZE)
    assert rig.load().kv_spare_bytes == 0


async def test_its_load_report_names_a_commanded_model_from_the_commands_coming_to_its_answer(
    rig: Rig,
) -> None:
    await rig.command(CommandKind.RELEASE)
    assert rig.worker.load_report().commanded == []
    async with rig.worker.instances[SMALL].lock:
        commands = [asyncio.create_task(rig.command(CommandKind.ACTIVATE)) for _ in range(2)]
        report = await rig.until_commanded([SMALL])
        assert report.models[0].state is ModelState.COLD, "it waits for whoever has the model"
    await rig.until_state(ModelState.STAGING)
    assert rig.worker.load_report().commanded == [SMALL]
    await asyncio.gather(*commands)
    assert (await rig.until_commanded([])).models[0].state is ModelState.ACTIVE


async def test_a_command_that_fails_is_no_longer_named_once_it_is_answered(rig: Rig) -> None:
    await rig.command(CommandKind.RELEASE, epoch=7)
    assert (await rig.command(CommandKind.RELEASE, epoch=6)).error is not None
    await rig.until_commanded([])


async def test_the_second_start_takes_the_engine_image(rig: Rig) -> None:
    await rig.command(CommandKind.ACTIVATE)
    first = tokens_of(await (await send(rig, "a", [9, 8, 7], 8)).all())
    await rig.command(CommandKind.DOZE)
    await rig.command(CommandKind.RELEASE)
    outcome = await rig.command(CommandKind.ACTIVATE)
    assert outcome.error is None
    assert tokens_of(await (await send(rig, "b", [9, 8, 7], 8)).all()) == first


async def test_an_older_epoch_is_refused(rig: Rig) -> None:
    await rig.command(CommandKind.RELEASE, epoch=7)
    outcome = await rig.command(CommandKind.ACTIVATE, epoch=6)
    assert outcome.error is not None
    assert outcome.error.code is ErrorCode.STALE_EPOCH
    assert outcome.state is ModelState.COLD


async def test_what_does_not_fit_is_refused_and_takes_nothing(rig: Rig) -> None:
    outcome = await rig.command(CommandKind.ACTIVATE, "tiny-llama-big")
    assert outcome.error is not None
    assert outcome.error.code is ErrorCode.OUT_OF_MEMORY
    assert rig.worker.ledger.reserved_bytes == 0


async def test_a_model_that_cannot_start_fails_with_its_reason_and_can_be_tried_again(
    rig: Rig, tmp_path: Path
) -> None:
    outcome = await rig.command(CommandKind.ACTIVATE, path=tmp_path / "nothing here")
    assert outcome.error is not None
    assert outcome.state is ModelState.FAILED
    assert "nothing here" in (rig.load().failure or "")
    assert rig.worker.ledger.reserved_bytes == 0
    outcome = await rig.command(CommandKind.ACTIVATE)
    assert outcome.state is ModelState.ACTIVE


async def test_two_activations_at_once_make_one_engine(rig: Rig) -> None:
    outcomes = await asyncio.gather(*(rig.command(CommandKind.ACTIVATE) for _ in range(2)))
    assert [outcome.state for outcome in outcomes] == [ModelState.ACTIVE] * 2
    assert sorted(bool(outcome.seconds) for outcome in outcomes) == [False, True]


async def test_a_cancelled_request_ends_and_leaves_the_engine(rig: Rig) -> None:
    await rig.command(CommandKind.ACTIVATE)
    frames = await send(rig, "a", [5, 6, 7], 1500)
    first = await frames.next()
    assert first is not None
    await rig.bus.publish(subjects.cancel(rig.id), CancelRequest("a".ljust(32, "0")))
    last = first
    while last.error is None:
        frame = await frames.next()
        assert frame is not None
        last = frame
    assert last.error.code is ErrorCode.CANCELLED
    assert last.seq < 1000


async def test_more_requests_than_fit_at_once_wait_their_turn(rig: Rig) -> None:
    await rig.command(CommandKind.ACTIVATE)
    sent = [await send(rig, f"{index}", [index + 3] * 5, 10) for index in range(12)]
    for frames in sent:
        assert len(tokens_of(await frames.all())) == 10


async def test_a_killed_engine_tells_its_requests_and_the_model_can_be_started_again(rig: Rig) -> None:
    await rig.command(CommandKind.ACTIVATE)
    frames = await send(rig, "a", [5, 6, 7], 1500)
    assert await frames.next() is not None
    engine = rig.worker.instances[SMALL].engine
    assert engine is not None
    engine.kill()
    error = await last_error(frames)
    assert error.code is ErrorCode.ENGINE_LOST
    assert error.retry
    await rig.until_state(ModelState.COLD)
    assert rig.worker.ledger.reserved_bytes == 0
    outcome = await rig.command(CommandKind.ACTIVATE)
    assert outcome.state is ModelState.ACTIVE


async def test_an_engine_that_is_stuck_is_ended_and_its_requests_go_on_elsewhere(impatient_rig: Rig) -> None:
    rig = impatient_rig
    await rig.command(CommandKind.ACTIVATE)
    frames = await send(rig, "a", [5, 6, 7], 1500)
    assert await frames.next() is not None
    engine = rig.worker.instances[SMALL].engine
    assert engine is not None
    os.kill(engine.pid, signal.SIGSTOP)
    error = await last_error(frames)
    assert error.code is ErrorCode.ENGINE_LOST
    assert error.retry
    assert "stuck" in error.message
    await rig.until_state(ModelState.COLD)
    assert not psutil.pid_exists(engine.pid)
    assert (await rig.command(CommandKind.ACTIVATE)).state is ModelState.ACTIVE


async def test_an_engine_that_is_stuck_while_it_wakes_is_replaced(impatient_rig: Rig) -> None:
    rig = impatient_rig
    await rig.command(CommandKind.ACTIVATE)
    await rig.command(CommandKind.DOZE)
    engine = rig.worker.instances[SMALL].engine
    assert engine is not None
    os.kill(engine.pid, signal.SIGSTOP)
    outcome = await rig.command(CommandKind.ACTIVATE)
    assert outcome.error is not None
    assert outcome.error.retry
    assert outcome.state is ModelState.COLD
    assert not psutil.pid_exists(engine.pid)
    assert rig.worker.ledger.reserved_bytes == 0
    assert (await rig.command(CommandKind.ACTIVATE)).state is ModelState.ACTIVE


async def test_dozing_lets_requests_finish_and_sends_those_that_take_too_long_elsewhere(rig: Rig) -> None:
    await rig.command(CommandKind.ACTIVATE)
    short = await send(rig, "a", [5, 6, 7], 30)
    long = await send(rig, "b", [5, 6, 8], 1800)
    assert await short.next() is not None
    assert await long.next() is not None
    outcome = await rig.command(CommandKind.DOZE, drain_s=0.5)
    assert outcome.state is ModelState.DOZING
    last = await long.next()
    while last is not None and last.error is None and last.finish is None:
        last = await long.next()
    assert last is not None
    assert last.error is not None
    assert last.error.code is ErrorCode.MOVED


async def test_an_engine_killed_while_it_drains_keeps_nobody_waiting(rig: Rig) -> None:
    await rig.command(CommandKind.ACTIVATE)
    frames = await send(rig, "a", [5, 6, 7], 1800)
    assert await frames.next() is not None
    engine = rig.worker.instances[SMALL].engine
    assert engine is not None
    dozing = asyncio.create_task(rig.command(CommandKind.DOZE, drain_s=DEADLINE_S))
    await rig.until_state(ModelState.DRAINING)
    engine.kill()
    assert (await last_error(frames)).code is ErrorCode.ENGINE_LOST
    outcome = await asyncio.wait_for(dozing, DEADLINE_S / 2)
    assert outcome.state is ModelState.COLD
    assert rig.worker.ledger.reserved_bytes == 0
    assert rig.worker.requests.count(SMALL) == 0
    assert (await rig.command(CommandKind.ACTIVATE)).state is ModelState.ACTIVE
    assert len(tokens_of(await (await send(rig, "b", [5, 6, 7], 4)).all())) == 4


async def test_a_store_that_is_away_leaves_the_model_cold_to_be_tried_again(
    session_nats: NatsServer, shells: ForkServerShells, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    async with worker_rig(session_nats, tmp_path / "store.sock", shells, tiny_models) as rig:
        outcome = await rig.command(CommandKind.ACTIVATE)
        assert outcome.error is not None
        assert outcome.error.code is ErrorCode.STORE_UNAVAILABLE
        assert outcome.state is ModelState.COLD
        assert "store.sock" in (rig.load().failure or "")
        assert rig.worker.ledger.reserved_bytes == 0
        async with store_process(session_nats, tmp_path):
            assert (await rig.command(CommandKind.ACTIVATE)).state is ModelState.ACTIVE
            assert rig.load().failure is None


async def test_a_store_with_room_for_one_copy_suffices_for_sleep_and_wake(
    session_nats: NatsServer, shells: ForkServerShells, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    async with (
        store_process(session_nats, tmp_path, memory_gb=0.035) as store,
        worker_rig(session_nats, store, shells, tiny_models) as rig,
    ):
        await rig.command(CommandKind.ACTIVATE)
        first = tokens_of(await (await send(rig, "a", [5, 6, 7], 8)).all())
        assert (await rig.command(CommandKind.DOZE)).state is ModelState.DOZING
        assert (await rig.command(CommandKind.ACTIVATE)).state is ModelState.ACTIVE
        assert tokens_of(await (await send(rig, "b", [5, 6, 7], 8)).all()) == first


async def test_log_probabilities_come_with_the_tokens(rig: Rig) -> None:
    await rig.command(CommandKind.ACTIVATE)
    frames = await (await send(rig, "a", [5, 6, 7], 4, top_logprobs=3)).all()
    logprobs = [entry for frame in frames for entry in frame.logprobs or []]
    assert len(logprobs) == 4
    for token, entry in zip(tokens_of(frames), logprobs, strict=True):
        assert len(entry.top) == 3
        assert entry.top[0][0] == token
        assert entry.top[0][1] == pytest.approx(entry.logprob)


async def test_a_minimum_of_tokens_keeps_stop_tokens_away_until_it_is_reached(rig: Rig) -> None:
    await rig.command(CommandKind.ACTIVATE)
    greedy = tokens_of(await (await send(rig, "a", [5, 6, 7], 6)).all())
    stop = SamplingParams(12, temperature=0, stop_token_ids=(greedy[0],))
    accepted, only = await (await send(rig, "b", [5, 6, 7], 12, sampling=stop)).all()
    assert not accepted.tokens
    assert only.finish is not None
    assert (only.finish.reason, only.finish.matched_token) == ("stop", greedy[0])
    sampling = msgspec.structs.replace(stop, min_new_tokens=4)
    later = tokens_of(await (await send(rig, "c", [5, 6, 7], 12, sampling=sampling)).all())
    assert len(later) > 4
    assert greedy[0] not in later[:4]


@pytest.mark.parametrize(
    "asked",
    [
        {"top_k": 5},
        {"top_p": 0.5},
        {"min_p": 0.05},
        {"min_p": 0.05, "top_p": 0.9, "top_k": 20},
        {"frequency_penalty": 0.5},
        {"presence_penalty": 0.5},
        {"repetition_penalty": 1.1},
        {"repetition_penalty": 1.1, "frequency_penalty": 0.5, "min_new_tokens": 2},
        {"logit_bias": {"5": 2.0}},
    ],
    ids=str,
)
async def test_whatever_may_be_asked_of_sampling_is_answered_without_holding_others_up(
    impatient_rig: Rig, asked: dict[str, object]
) -> None:
    rig = impatient_rig
    await rig.command(CommandKind.ACTIVATE)
    engine = rig.worker.instances[SMALL].engine
    for temperature in (1.0, 0.0):
        sampling = msgspec.structs.replace(
            SamplingParams(6, temperature=temperature, ignore_eos=True, seed=7), **asked
        )
        first = await (await send(rig, f"a{temperature}", [5, 6, 7], 6, sampling=sampling)).all()
        assert first[-1].error is None, first[-1].error
        again = await (await send(rig, f"b{temperature}", [5, 6, 7], 6, sampling=sampling)).all()
        assert tokens_of(again) == tokens_of(first), "the same seed, the same tokens"
    assert rig.worker.instances[SMALL].engine is engine


async def test_a_min_p_of_one_leaves_only_the_likeliest_token(rig: Rig) -> None:
    await rig.command(CommandKind.ACTIVATE)
    greedy = tokens_of(await (await send(rig, "a", [5, 6, 7], 8)).all())
    likeliest = SamplingParams(8, temperature=1.0, min_p=1.0, ignore_eos=True, seed=3)
    assert tokens_of(await (await send(rig, "b", [5, 6, 7], 8, sampling=likeliest)).all()) == greedy


async def test_a_high_penalty_on_repetition_lets_nothing_come_twice(rig: Rig) -> None:
    await rig.command(CommandKind.ACTIVATE)
    once = SamplingParams(20, temperature=0, repetition_penalty=2.0, ignore_eos=True)
    tokens = tokens_of(await (await send(rig, "a", [5, 6, 7], 20, sampling=once)).all())
    assert len(set(tokens)) == len(tokens) == 20


@pytest.mark.parametrize(
    "bad",
    [
        {"input_ids": [5, 10**6]},
        {"input_ids": [-1, 5]},
        {"input_ids": []},
        {"input_ids": [5] * 3000},
        {"sampling": SamplingParams(4, logit_bias={"1000000": 5.0})},
        {"sampling": SamplingParams(4, min_new_tokens=2, stop_token_ids=(10**6,))},
        {"sampling": SamplingParams(4, temperature=-1.0)},
    ],
    ids=["past the vocabulary", "negative", "empty", "too long", "bias", "stop token", "temperature"],
)
async def test_a_request_that_cannot_be_run_is_refused_and_the_engine_lives_on(
    rig: Rig, bad: dict[str, object]
) -> None:
    await rig.command(CommandKind.ACTIVATE)
    frames = await (await send(rig, "a", [5, 6, 7], 4, **bad)).all()
    assert frames[-1].error is not None
    assert frames[-1].error.code is ErrorCode.INVALID_REQUEST
    assert not frames[-1].error.retry
    assert len(tokens_of(await (await send(rig, "b", [5, 6, 7], 4)).all())) == 4


async def test_a_route_that_somebody_takes_down_is_written_again(rig: Rig) -> None:
    await rig.command(CommandKind.ACTIVATE)
    routes = await rig.bus.bucket(subjects.BUCKET_ROUTES)
    back = asyncio.Event()
    gone = asyncio.Event()

    def on_change(_: str, route: Route | None) -> None:
        if route is None:
            gone.set()
        elif gone.is_set():
            back.set()

    key = subjects.route_key(SMALL, rig.id)
    async with mirror_bucket(rig.bus, subjects.BUCKET_ROUTES, Route, pattern=key, on_change=on_change):
        await routes.delete(key)
        await asyncio.wait_for(back.wait(), DEADLINE_S)
    await rig.command(CommandKind.DOZE)
    with pytest.raises(KeyNotFoundError):
        await routes.get(key)


async def test_a_malformed_command_is_answered(rig: Rig) -> None:
    answer = await rig.bus.client.request(
        subjects.command(rig.id), encode({"kind": "activate"}), timeout=DEADLINE_S
    )
    outcome = decode(answer.data, CommandOutcome)
    assert outcome.error is not None
    assert outcome.error.code is ErrorCode.BAD_MESSAGE
