"""Warm shells on a CPU: a process that has imported SGLang once and forks an engine host in milliseconds.

Run as `python -m prism.gpu_worker.fork_server FD`. It stays single-threaded and never makes an engine
itself, so a fork copies nothing but memory that all engines then share. On CUDA this would not do: a
context does not survive a fork, so shells there are started processes.
"""

import ctypes
import logging
import os
import select
import signal
import socket
import sys

from prism.common.process import die_with_parent
from prism.gpu_worker.engine_logs import configure_engine_logging
from prism.gpu_worker.kernel_caches import keep_compiled_kernels
from prism.gpu_worker.shells import ForkServerReply, decode_exit, encode_reply

log = logging.getLogger("fork_server")


def prepare_environment() -> None:
    """What SGLang must see before it is imported on a CPU."""
    os.environ.update(
        SGLANG_USE_CPU_ENGINE="1",
        CUDA_VISIBLE_DEVICES="",
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
    )
    keep_compiled_kernels()


def main() -> None:
    """Import, say so, and fork on demand until the worker is gone."""
    control = socket.socket(fileno=int(sys.argv[1]))
    configure_engine_logging()
    die_with_parent(signal.SIGKILL)
    # A scheduler of SGLang's that gives up signals its parent this way; we learn of it by its socket.
    signal.signal(signal.SIGQUIT, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prepare_environment()
    import_engine()
    wakeup_read, wakeup_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wakeup_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    control.send(encode_reply(ForkServerReply("ready")))
    while True:
        readable, _, _ = select.select([control.fileno(), wakeup_read], [], [])
        if wakeup_read in readable:
            os.read(wakeup_read, 4096)
            _reap(control)
        if control.fileno() in readable:
            message, fds, _, _ = socket.recv_fds(control, 64, 1)
            if not message:
                # Tearing down an interpreter full of torch takes seconds, and frees nothing the kernel won't.
                os._exit(0)
            why = ""
            try:
                pid = os.fork()
            except OSError as error:
                pid, why = -1, f"fork: {error}"
            if pid == 0:
                _become_engine(control, fds[0], (wakeup_read, wakeup_write))
            os.close(fds[0])
            control.send(encode_reply(ForkServerReply("spawned", max(pid, 0), why, int(message))))


def import_engine() -> None:
    """Import all that an engine needs, so that its children don't have to."""
    import warnings

    warnings.filterwarnings("ignore")
    logging.getLogger("sglang").setLevel(logging.ERROR)
    from sglang.srt.distributed.device_communicators import pynccl, shm_broadcast  # noqa: F401
    from sglang.srt.layers.attention import torch_native_backend  # noqa: F401
    from sglang.srt.managers import tp_worker  # noqa: F401
    from sglang.srt.models import registry  # noqa: F401  (imports every model class that can be)

    import prism.gpu_worker.engine.host  # noqa: F401

    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        log.warning("%d threads after import; forked engines lose all but one", threads)


def _reap(control: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        control.send(encode_reply(ForkServerReply("exited", pid, decode_exit(status))))


def _become_engine(control: socket.socket, connection: int, inherited: tuple[int, int]) -> None:
    """In the child: be an engine host, and never return into the fork server's code."""
    try:
        signal.set_wakeup_fd(-1)
        for signum in (signal.SIGCHLD, signal.SIGQUIT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_DFL)
        die_with_parent(signal.SIGKILL)
        control.close()
        for fd in inherited:
            os.close(fd)
        ctypes.CDLL(None).malloc_trim(0)
        from prism.gpu_worker.engine.host import serve_and_exit
        from prism.gpu_worker.engine.process_group import meet_in_memory

        meet_in_memory()
        serve_and_exit(connection)
    except BaseException:
        log.exception("no engine host")
    finally:
        os._exit(1)


if __name__ == "__main__":
    main()
