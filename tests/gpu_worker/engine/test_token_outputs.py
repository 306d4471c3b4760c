"""Which tokens are said when, of requests that somebody streams and of others. In a process of its own:
SGLang is not to be imported into pytest's."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

PROGRAM = """
from types import SimpleNamespace
from prism.gpu_worker.engine import token_outputs
from prism.gpu_worker.engine.token_outputs import TokenStreamer

now = 0.0
token_outputs.time = SimpleNamespace(monotonic=lambda: now)
said = []
fields = dict.fromkeys(
    "send_to_detokenizer tree_cache ps server_args is_generation spec_algorithm disaggregation_mode "
    "enable_hicache_storage".split()
)
fields["send_to_detokenizer"] = SimpleNamespace(
    send_tokens=lambda outputs, unsaid: said.append(([(each.rid, each.tokens) for each in outputs], unsaid))
)
streamer = TokenStreamer(**fields, unstreamed_s=0.1, _said_at=0.0)

def request(rid, stream):
    ids = []
    return SimpleNamespace(
        rid=rid, stream=stream, return_logprob=False, origin_input_ids=[1], cached_tokens=0,
        output_ids=ids, output_ids_through_stop=ids, send_token_offset=0,
        finished=lambda: False, finished_output=None,
    )

def step(at, *requests):
    global now
    now = at
    for each in requests:
        each.output_ids.append(len(each.output_ids))
    streamer._stream_output_generation(list(requests), False)
    return said.pop()

quiet, loud = request("quiet", False), request("loud", True)
assert step(0.01, quiet, loud) == ([("quiet", [0]), ("loud", [0])], False), "the first of each at once"
assert step(0.02, quiet, loud) == ([("loud", [1])], True)
assert step(0.03, quiet) == ([], True)
# A prefill of somebody else takes long; what it says is not the turn of those who wait.
other = request("other", False)
assert step(0.15, other) == ([("other", [0])], False)
assert step(0.16, quiet, loud) == ([("quiet", [1, 2, 3]), ("loud", [2])], False)
assert step(0.17, quiet) == ([], True)
"""


def test_unstreamed_tokens_are_said_when_their_time_has_come_whatever_else_is_said(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        check=False,
    )
    assert run.returncode == 0, run.stderr
