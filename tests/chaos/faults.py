"""What can go wrong, done for real: signals to processes, a bus that goes away."""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random

import psutil
from tests.chaos.stage import Stage
from tests.processes import command_line

from prism.cli.service_process import ServiceProcess

SETTLE_DEADLINE_S = 60.0
LOOK_S = 0.1


@dataclass(frozen=True)
class Fault:
    """A fault by name; `do` does it and returns once what was lost is there again. Only where it
    `breaks_streams` may a client's connection end before its answer."""

    name: str
    do: Callable[[Stage, Random], Awaitable[None]]
    breaks_streams: bool = False


async def _until(condition: Callable[[], bool], what: str) -> None:
    try:
        async with asyncio.timeout(SETTLE_DEADLINE_S):
            while not condition():  # noqa: ASYNC110 (processes make no events here)
                await asyncio.sleep(LOOK_S)
    except TimeoutError:
        raise TimeoutError(f"not within {SETTLE_DEADLINE_S:.0f} s: {what}") from None


async def _busy_engine(stage: Stage, chance: Random) -> psutil.Process:
    def models_at_work() -> set[str]:
        return {
            load.model for report in stage.view.living().values() for load in report.models if load.running
        }

    await _until(lambda: bool(models_at_work()), "an engine at work")
    busy = models_at_work()
    engines = [engine for engine in stage.engines() if busy & set(" ".join(command_line(engine)).split())]
    return chance.choice(engines or stage.engines())


async def kill_engine(stage: Stage, chance: Random) -> None:
    """Kill -9 an engine that serves, as the kernel does when memory runs out."""
    (await _busy_engine(stage, chance)).kill()


async def freeze_engine(stage: Stage, chance: Random) -> None:
    """Stop an engine that serves without ending it: it must be found out, and replaced."""
    engine = await _busy_engine(stage, chance)
    engine.suspend()
    await _until(lambda: not engine.is_running(), "the end of an engine that is stuck")


async def crash_engine(stage: Stage, chance: Random) -> None:
    """An engine that ends by a fault of its own."""
    (await _busy_engine(stage, chance)).send_signal(signal.SIGSEGV)


def bus_away(seconds: float) -> Callable[[Stage, Random], Awaitable[None]]:
    """The NATS server is killed, and comes back after `seconds`."""

    async def do(stage: Stage, chance: Random) -> None:
        stage.nats.kill()
        await asyncio.sleep(seconds)
        stage.nats.start()

    return do


async def empty_bus(stage: Stage, chance: Random) -> None:
    """The NATS server is killed, and comes back without anything that it knew."""
    stage.nats.kill()
    stage.nats.forget()
    stage.nats.start()


async def _killed_and_replaced(service: ServiceProcess) -> None:
    process = service.process
    assert process is not None
    process.kill()
    await process.wait()
    await _until(
        lambda: (
            service.process is not process
            and service.process is not None
            and service.process.returncode is None
        ),
        f"{service.name} started again",
    )


async def kill_worker(stage: Stage, chance: Random) -> None:
    """Kill -9 a worker; its engines go with it."""
    await _killed_and_replaced(chance.choice(stage.services("gpu_worker")))


async def kill_fork_server(stage: Stage, chance: Random) -> None:
    """Kill -9 the process that a worker's engines are forked from."""
    worker = chance.choice(stage.services("gpu_worker")).process
    assert worker is not None
    for child in psutil.Process(worker.pid).children():
        child.kill()


async def kill_store(stage: Stage, chance: Random) -> None:
    """Kill -9 a model store."""
    await _killed_and_replaced(chance.choice(stage.services("model_store")))


async def kill_leader(stage: Stage, chance: Random) -> None:
    """Kill -9 the leading scheduler."""
    before = stage.view.leader
    await _killed_and_replaced(stage.system.services[stage.leading])
    await _until(lambda: stage.view.leader not in ("", before), "another leader")


async def kill_gateway(stage: Stage, chance: Random) -> None:
    """Kill -9 one of two gateways; its clients turn to the other."""
    await _killed_and_replaced(chance.choice(stage.services("gateway")))


async def drain_worker(stage: Stage, chance: Random) -> None:
    """SIGTERM to a worker, as an upgrade does, and one in its place."""
    service = chance.choice(stage.services("gpu_worker"))
    process = service.process
    assert process is not None
    process.terminate()
    await process.wait()
    await _until(lambda: service.process is not process, f"{service.name} started again")


FAULTS = [
    Fault("engine killed", kill_engine),
    Fault("engine crashed", crash_engine),
    Fault("engine stuck", freeze_engine),
    Fault("fork server killed", kill_fork_server),
    Fault("bus restarted", bus_away(0)),
    Fault("bus away 5 s", bus_away(5)),
    Fault("bus away 30 s", bus_away(30)),
    Fault("bus lost its state", empty_bus),
    Fault("worker killed", kill_worker),
    Fault("worker drained", drain_worker),
    Fault("store killed", kill_store),
    Fault("leader killed", kill_leader),
    Fault("gateway killed", kill_gateway, breaks_streams=True),
]
SHORT = ["engine killed", "bus restarted", "leader killed", "gateway killed"]
