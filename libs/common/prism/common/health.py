"""`python -m prism.common.health SERVICE`: whether the SERVICE of this host serves, as an exit status.

For a container's health check: its host name is the container's own, and it runs one service. Status 0 says
that the service answers, 1 that it does not, with one line that says what is wrong and what to do.
"""

import argparse
import json
import os
import socket
import sys
from http.client import HTTPConnection, HTTPException

from prism.common.bare_nats import NoAnswerError, address_of, answers

SERVICES = ("gateway", "global_scheduler", "gpu_worker", "model_store")
DEADLINE_S = 5.0
ANY_ADDRESS = ("", "0.0.0.0", "::")


class UnhealthyError(Exception):
    """What is wrong, and what to do, in one line."""


def check_bus(service: str, nats_url: str, deadline_s: float) -> str:
    """The instance of `service` on this host that answers its $SRV.PING on the bus.

    Raises UnhealthyError when none has within `deadline_s` seconds, or the bus is not there.
    """
    here = socket.gethostname()
    elsewhere = 0
    try:
        for answer in answers(nats_url, f"$SRV.PING.prism-{service.replace('_', '-')}", deadline_s):
            metadata = json.loads(answer)["metadata"]
            if metadata.get("host") == here:
                return str(metadata["instance"])
            elsewhere += 1
    except NoAnswerError as error:
        raise UnhealthyError(str(error)) from error
    raise UnhealthyError(
        f"no {service} of this host ({here}) answers on the bus at {address_of(nats_url)}, {elsewhere} of "
        "other hosts do: it is starting, stuck or not connected; see its log"
    )


def check_gateway(host: str, port: int, deadline_s: float) -> str:
    """The address of the gateway that is ready there: connected to the bus, with fresh state from it.

    Raises UnhealthyError when it says that it is not, or does not answer within `deadline_s` seconds.
    """
    address = f"{'127.0.0.1' if host in ANY_ADDRESS else host}:{port}"
    connection = HTTPConnection(address, timeout=deadline_s)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        said = answer.read()
    except (OSError, HTTPException) as error:
        raise UnhealthyError(
            f"no gateway answers at http://{address}/readyz ({error or type(error).__name__}): "
            "it is starting, stuck or listens elsewhere (PRISM_GATEWAY_HOST, PRISM_GATEWAY_PORT); see its log"
        ) from error
    finally:
        connection.close()
    if answer.status != 200:
        raise UnhealthyError(f"the gateway at http://{address} is not ready: {_reason(said)}")
    return address


def _reason(said: bytes) -> str:
    try:
        return str(json.loads(said)["reason"])
    except (ValueError, KeyError, TypeError):
        return said[:200].decode(errors="replace")


def main(arguments: list[str] | None = None) -> int:
    """Check what the command line says. Returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m prism.common.health", description="Whether the service of this host serves."
    )
    parser.add_argument("service", choices=SERVICES)
    parser.add_argument(
        "--nats",
        default=os.environ.get("PRISM_NATS_URL") or "nats://127.0.0.1:4222",
        help="The bus. [env var: PRISM_NATS_URL; default: %(default)s]",
    )
    parser.add_argument(
        "--host",
        default=os.environ.get("PRISM_GATEWAY_HOST") or "127.0.0.1",
        help="Where the gateway listens. [env var: PRISM_GATEWAY_HOST; default: %(default)s]",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=os.environ.get("PRISM_GATEWAY_PORT") or "8000",
        help="The gateway's port. [env var: PRISM_GATEWAY_PORT; default: %(default)s]",
    )
    parser.add_argument(
        "--deadline-s", type=float, default=DEADLINE_S, help="Time to answer. [default: %(default)s]"
    )
    given = parser.parse_args(arguments)
    try:
        if given.service == "gateway":
            healthy = check_gateway(given.host, given.port, given.deadline_s)
        else:
            healthy = check_bus(given.service, given.nats, given.deadline_s)
    except UnhealthyError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{given.service} {healthy} serves")
    return 0


if __name__ == "__main__":
    sys.exit(main())
