"""`python -m sglang.bench_serving`, with the three backends that speak what the gateway speaks."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.clients.conftest import BENCH_SERVING_PACKAGES, MODEL, Count, Run

from prism.cli.system import RunningSystem

pytestmark = pytest.mark.engine

REQUESTS = 8
WARM_UP = 1
INPUT_TOKENS = 20
OUTPUT_TOKENS = 12

COMPLETIONS, CHAT, GENERATE = "/v1/completions", "/v1/chat/completions", "/generate"


@pytest.mark.parametrize(
    ("backend", "endpoint", "options"),
    [
        ("sglang-oai", COMPLETIONS, []),
        ("sglang-oai-chat", CHAT, []),
        ("sglang-oai-chat", CHAT, ["--disable-stream"]),
        # This backend names no model, which a gateway with several needs.
        ("sglang", GENERATE, ["--tokenize-prompt", "--extra-request-body", json.dumps({"model": MODEL})]),
    ],
    ids=["completions", "chat", "chat-not-streamed", "generate"],
)
async def test_all_requests_bring_all_their_tokens(
    run: Run,
    count: Count,
    system: RunningSystem,
    tiny_models: dict[str, Path],
    tmp_path: Path,
    backend: str,
    endpoint: str,
    options: list[str],
) -> None:
    before = await count()
    result = tmp_path / "result.jsonl"
    await run(
        *(
            sys.executable,
            "-m",
            "sglang.bench_serving",
            "--backend",
            backend,
            "--base-url",
            system.gateway_url,
        ),
        *("--model", tiny_models[MODEL], "--served-model-name", MODEL, "--dataset-name", "random-ids"),
        *("--random-input-len", str(INPUT_TOKENS), "--random-output-len", str(OUTPUT_TOKENS)),
        *("--random-range-ratio", "1.0", "--num-prompts", str(REQUESTS), "--warmup-requests", str(WARM_UP)),
        *("--output-file", result, "--output-details", "--disable-tqdm", *options),
        PYTHONPATH=str(BENCH_SERVING_PACKAGES),
    )
    after = await count()
    told: dict[str, Any] = json.loads(result.read_text())

    assert told["errors"] == [""] * REQUESTS
    assert told["completed"] == REQUESTS
    assert told["output_lens"] == [OUTPUT_TOKENS] * REQUESTS
    assert all(told["generated_texts"])
    assert all(0 < ttft < told["duration"] for ttft in told["ttfts"])
    if "--disable-stream" in options:
        assert not any(told["itls"])
    else:
        # A token that only begins a character makes no chunk, so there may be fewer than tokens.
        assert all(len(gaps) > OUTPUT_TOKENS // 4 for gaps in told["itls"])

    # A streamed answer without usage counts as what was asked for: the gateway's own count says if it was so.
    sent = REQUESTS + WARM_UP
    assert after.requests(endpoint, 200, MODEL) - before.requests(endpoint, 200, MODEL) == sent
    assert after.generated_tokens(MODEL) - before.generated_tokens(MODEL) == sent * OUTPUT_TOKENS
    if "--tokenize-prompt" in options:
        assert told["input_lens"] == [INPUT_TOKENS] * REQUESTS
        assert after.prompt_tokens(MODEL) - before.prompt_tokens(MODEL) == sent * INPUT_TOKENS
