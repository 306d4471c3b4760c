"""What LangChain's ChatOpenAI sees of a gateway, as JSON.

Arguments: BASE_URL MODEL OUTPUT_TOKENS RESULT_FILE. Runs in the clients' environment, where nothing of this
project is installed.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

MESSAGES = [SystemMessage("Be brief."), HumanMessage("Tell me of the sea.")]
LONG_ANSWER_TOKENS = 1500
CONCURRENT = 8


async def main(base_url: str, model: str, output_tokens: int) -> dict[str, Any]:
    """All that was asked, and how each was answered."""

    def chat(**changes: Any) -> ChatOpenAI:
        settings: dict[str, Any] = {
            "base_url": base_url,
            "api_key": "unused",
            "model": model,
            "max_retries": 0,
            "timeout": 60,
            "temperature": 0,
            "max_tokens": output_tokens,
            "extra_body": {"ignore_eos": True},
        }
        return ChatOpenAI(**{**settings, **changes})

    def refused(**changes: Any) -> list[str]:
        try:
            chat(**changes).invoke(MESSAGES)
        except Exception as error:
            return [f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__]
        return []

    async def leave_a_stream() -> str:
        stream = chat(max_tokens=LONG_ANSWER_TOKENS).astream(MESSAGES)
        async for chunk in stream:
            if chunk.content:
                await stream.aclose()
                return str(chunk.content)
        return ""

    greedy = chat()
    first = greedy.invoke(MESSAGES)
    second = greedy.invoke([*MESSAGES, first, HumanMessage("And of the trees?")])
    chain = ChatPromptTemplate.from_messages([("system", "Be brief."), ("human", "Tell me of {what}.")])
    return {
        "invoke": whole(first),
        "ainvoke": whole(await greedy.ainvoke(MESSAGES)),
        "stream": streamed(list(chat(stream_usage=True).stream(MESSAGES))),
        "next_turn": whole(second),
        "batch": [whole(answer) for answer in greedy.batch([MESSAGES] * CONCURRENT)],
        "chain": (chain | greedy | StrOutputParser()).invoke({"what": "the sea"}),
        "unknown_model": refused(model="no-such-model"),
        "impossible_temperature": refused(temperature=9),
        "left_after": await leave_a_stream(),
    }


def whole(answer: Any) -> dict[str, Any]:
    finish = answer.response_metadata["finish_reason"]
    return {"text": answer.content, "finish": finish, "usage": told(answer.usage_metadata)}


def streamed(chunks: list[Any]) -> dict[str, Any]:
    added = chunks[0]
    for chunk in chunks[1:]:
        added = added + chunk
    return {**whole(added), "chunks": sum(bool(chunk.content) for chunk in chunks)}


def told(usage: Any) -> list[int]:
    return [usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]]


if __name__ == "__main__":
    seen = asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
    Path(sys.argv[4]).write_text(json.dumps(seen))
