"""Names of instances: unique per process, readable, safe in a subject."""

import re
import secrets
import socket


def instance_id(role: str) -> str:
    """A fresh id such as 'worker-3f9a1c'."""
    return f"{role}-{secrets.token_hex(3)}"


def node_name() -> str:
    """This host's name, safe as a subject token. Services that share memory share it."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", socket.gethostname()) or "node"
