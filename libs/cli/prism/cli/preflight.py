"""What would keep a system from coming up, found before anything of it is started."""

import socket
from importlib.util import find_spec
from urllib.parse import urlsplit

import nats.js.errors

from prism.cli.system import SystemSettings
from prism.common.errors import ErrorCode, PrismError, words_of
from prism.common.nats_client import close_client, connect_client

BUS_DEADLINE_S = 3.0
HIGHEST_PORT = 65535
NATS_SCHEMES = ("nats", "tls", "ws", "wss")
GPU_MODULES = ("pynvml", "kvcached")


async def check_before_start(settings: SystemSettings) -> None:
    """Raises PrismError, with what to do, where the system of `settings` could not come up."""
    if settings.device == "cuda":
        check_gpu_packages()
    if settings.port:
        for number in range(settings.gateways):
            check_port(settings.host, settings.port + number)
    if settings.nats_url:
        await check_bus(settings.nats_url)


def check_gpu_packages() -> None:
    """Raises PrismError where workers on `cuda` would find their libraries missing."""
    missing = [module for module in GPU_MODULES if find_spec(module) is None]
    if missing:
        raise PrismError(
            ErrorCode.INVALID_REQUEST,
            f"--device cuda needs the GPU packages, which are not installed ({', '.join(missing)}): "
            "make setup PROFILE=gpu, or docs/gpu.md for a host without network",
        )


def check_port(host: str, port: int) -> None:
    """Raises PrismError, as a gateway would, where none can listen on `port` of `host` now."""
    try:
        if port > HIGHEST_PORT:
            raise OSError(None, f"the highest port is {HIGHEST_PORT}")
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            # Two may be bound to a port with SO_REUSEADDR, but only one listens.
            probe.listen()
    except OSError as error:
        raise PrismError(
            ErrorCode.INVALID_REQUEST,
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --port (0: any free one)",
        ) from error


async def check_bus(url: str, deadline_s: float = BUS_DEADLINE_S) -> None:
    """Raises PrismError where `url` is no URL of a NATS server, no server answers there within `deadline_s`,
    or it has no JetStream."""
    # nats-py takes HOST:PORT as well, and any other word as a host's name.
    scheme, separator, _ = url.rpartition("://")
    try:
        there = urlsplit(url if separator else f"nats://{url}")
        known = scheme in NATS_SCHEMES if separator else there.port is not None
        sound = known and bool(there.hostname) and there.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise PrismError(
            ErrorCode.INVALID_REQUEST, f"--nats {url} is no URL of a NATS server; nats://HOST:PORT is one"
        )
    client = await connect_client(
        url, deadline_s, name="prism up", error_cb=_silent, max_reconnect_attempts=-1
    )
    try:
        await client.jetstream(timeout=deadline_s).account_info()
    except nats.js.errors.ServiceUnavailableError as error:
        raise PrismError(
            ErrorCode.INVALID_REQUEST,
            f"the NATS server at {url} has no JetStream: start it with --jetstream, or leave out --nats",
        ) from error
    except (nats.js.errors.Error, nats.errors.Error, TimeoutError) as error:
        raise PrismError(
            ErrorCode.INTERNAL, f"the NATS server at {url} does not tell of its JetStream: {words_of(error)}"
        ) from error
    finally:
        await close_client(client)


async def _silent(_error: Exception) -> None:
    """Tries that fail are told once, by the deadline."""
