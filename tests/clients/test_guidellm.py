"""`guidellm run`, with its defaults but for the size of the load."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.clients.conftest import CLIENTS, MODEL, Count, Run

from prism.cli.system import RunningSystem

pytestmark = pytest.mark.engine

REQUESTS = 6
STREAMS = 2
PROMPT_TOKENS = 24
OUTPUT_TOKENS = 12


@pytest.mark.parametrize(
    ("endpoint", "streamed"), [("/v1/chat/completions", True), ("/v1/completions", False)]
)
async def test_all_requests_bring_all_their_tokens(
    run: Run,
    count: Count,
    system: RunningSystem,
    tiny_models: dict[str, Path],
    tmp_path: Path,
    endpoint: str,
    streamed: bool,
) -> None:
    before = await count()
    report = tmp_path / "report.json"
    target = f"kind=openai_http,target={system.gateway_url},model={MODEL}"
    await run(
        *(CLIENTS / "bin" / "guidellm", "run", "--disable-console-interactive"),
        *("--backend", f"{target},request_format={endpoint},stream={str(streamed).lower()}"),
        *("--profile", f"kind=concurrent,streams={STREAMS}"),
        *("--constraint", f"kind=max_requests,count={REQUESTS}"),
        *("--tokenizer", f"kind=huggingface_auto,model={tiny_models[MODEL]}"),
        *("--data", f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}"),
        *("--output", f"kind=json,path={report}"),
    )
    after = await count()
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    requests: dict[str, list[dict[str, Any]]] = benchmark["requests"]

    assert requests["errored"] == []
    assert requests["incomplete"] == []
    done = requests["successful"]
    assert len(done) == REQUESTS
    assert [request["output_tokens"] for request in done] == [OUTPUT_TOKENS] * REQUESTS
    assert all(request["prompt_tokens"] >= PROMPT_TOKENS for request in done)
    assert all(request["output"] for request in done)
    for request in done:
        assert json.loads(request["request_args"])["body"].get("stream", False) is streamed
        if streamed:
            latency_ms = 1000 * request["request_latency"]
            assert 0 < request["time_to_first_token_ms"] < latency_ms
            assert request["info"]["timings"]["token_iterations"] > OUTPUT_TOKENS // 4

    assert after.requests(endpoint, 200, MODEL) - before.requests(endpoint, 200, MODEL) == REQUESTS
    made = after.generated_tokens(MODEL) - before.generated_tokens(MODEL)
    assert made == REQUESTS * OUTPUT_TOKENS
    prompts = after.prompt_tokens(MODEL) - before.prompt_tokens(MODEL)
    assert prompts == sum(request["prompt_tokens"] for request in done)
