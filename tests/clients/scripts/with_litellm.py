"""What LiteLLM's client sees of a gateway, as JSON.

Arguments: BASE_URL MODEL OUTPUT_TOKENS RESULT_FILE. Runs in the clients' environment, where nothing of this
project is installed.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import litellm

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me of the sea."}]
LONG_ANSWER_TOKENS = 1500
CONCURRENT = 8


async def main(base_url: str, model: str, output_tokens: int) -> dict[str, Any]:
    """All that was asked, and how each was answered."""
    common: dict[str, Any] = {"api_base": base_url, "api_key": "unused", "num_retries": 0, "timeout": 60}
    greedy = {**common, "max_tokens": output_tokens, "temperature": 0, "extra_body": {"ignore_eos": True}}
    chat = {**greedy, "model": f"openai/{model}", "messages": MESSAGES}
    text = {**greedy, "model": f"text-completion-openai/{model}", "prompt": "Once upon a time"}

    def refused(**changes: Any) -> list[str]:
        try:
            litellm.completion(**{**chat, **changes})
        except Exception as error:
            return [f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__]
        return []

    async def leave_a_stream() -> str:
        stream = await litellm.acompletion(**{**chat, "max_tokens": LONG_ANSWER_TOKENS, "stream": True})
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                await stream.aclose()
                return str(chunk.choices[0].delta.content)
        return ""

    usage_too = {"stream": True, "stream_options": {"include_usage": True}}
    together = await asyncio.gather(*(litellm.acompletion(**chat) for _ in range(CONCURRENT)))
    return {
        "chat": whole(litellm.completion(**chat)),
        "chat_stream": streamed(litellm.completion(**chat, **usage_too)),
        "text": whole(litellm.text_completion(**text)),
        "text_stream": streamed(litellm.text_completion(**text, **usage_too)),
        "together": [whole(answer) for answer in together],
        "unknown_model": refused(model="openai/no-such-model"),
        "impossible_temperature": refused(temperature=9),
        "left_after": await leave_a_stream(),
    }


def whole(answer: Any) -> dict[str, Any]:
    choice = answer.choices[0]
    text = choice.message.content if hasattr(choice, "message") else choice.text
    return {"text": text, "finish": choice.finish_reason, "usage": told(answer.usage)}


def streamed(chunks: Any) -> dict[str, Any]:
    texts, finishes, usages = [], [], []
    for chunk in chunks:
        for choice in chunk.choices:
            text = choice.delta.content if hasattr(choice, "delta") else choice.text
            texts += [text] if text else []
            finishes += [choice.finish_reason] if choice.finish_reason else []
        if (usage := getattr(chunk, "usage", None)) is not None:
            usages.append(told(usage))
    return {"text": "".join(texts), "chunks": len(texts), "finish": finishes[-1], "usage": usages[-1]}


def told(usage: Any) -> list[int]:
    return [usage.prompt_tokens, usage.completion_tokens, usage.total_tokens]


if __name__ == "__main__":
    seen = asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
    Path(sys.argv[4]).write_text(json.dumps(seen))
