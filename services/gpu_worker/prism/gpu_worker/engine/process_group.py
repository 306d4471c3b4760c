"""Where the ranks of an engine find each other."""

import os

INIT_METHOD = "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"


def meet_in_memory() -> int:
    """Have ranks find each other through memory instead of a TCP port: nothing to collide with, nothing that
    an engine killed here would leave on disk.

    Before they are forked or started: all use the descriptor that is returned, by its number.
    """
    group = os.memfd_create("prism-process-group")
    os.environ[INIT_METHOD] = f"file:///proc/self/fd/{group}"
    return group
