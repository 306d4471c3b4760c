"""What /v1/chat/completions and /v1/completions share: parameters, and their meaning."""

from enum import Enum, auto
from typing import Any

import msgspec

from prism.common.errors import ErrorCode, PrismError
from prism.gateway.plan import Choice, Servable, Usage
from prism.gateway.request_fields import invalid, refuse_unsupported
from prism.gateway.sampling import SamplingFields, check_sampling
from prism.gateway.text_assembler import TokenScore


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """Options of a stream."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class StreamedUsage(Enum):
    """Which chunks of a stream tell the tokens used: none, one after the last text, or that and all before,
    each with what its choice has used so far (as vLLM and SGLang do)."""

    NOWHERE = auto()
    AT_THE_END = auto()
    IN_EVERY_CHUNK = auto()

    def so_far(self, choice: Choice, completion_tokens: int) -> Usage | None:
        """What a chunk tells that brings `choice` to so many tokens; None: nothing."""
        if self is not StreamedUsage.IN_EVERY_CHUNK:
            return None
        prompt_tokens = len(choice.job.input_ids)
        return Usage(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens)


class OpenAIFields(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    """Common parameters. Those typed Any are known and not supported; see `HARMLESS`."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    seed: int | None = None
    n: int | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: Any = None

    @property
    def streamed_usage(self) -> StreamedUsage:
        """Which chunks of the stream tell the usage."""
        options = self.stream_options
        if options is None or not options.include_usage:
            return StreamedUsage.NOWHERE
        return StreamedUsage.IN_EVERY_CHUNK if options.continuous_usage_stats else StreamedUsage.AT_THE_END


HARMLESS_EVERYWHERE: dict[str, tuple[Any, ...]] = {"store": (False,)}


def check_fields(request: OpenAIFields, harmless: dict[str, tuple[Any, ...]]) -> None:
    """Raises PrismError for what is out of range or not supported."""
    refuse_unsupported(msgspec.structs.asdict(request), {**HARMLESS_EVERYWHERE, **harmless})
    if request.stream_options is not None:
        _check_stream_options(request.stream_options)
        if not request.stream:
            raise invalid("stream_options", "stream_options is allowed only where stream is true")
    check_sampling(request)
    if not request.model:
        raise invalid("model", "model must not be empty")


def _check_stream_options(options: StreamOptions) -> None:
    if options.include_obfuscation:
        raise PrismError(
            ErrorCode.UNSUPPORTED,
            "stream_options.include_obfuscation is not supported; leave it out",
            param="stream_options.include_obfuscation",
        )
    if options.continuous_usage_stats and not options.include_usage:
        raise invalid(
            "stream_options.continuous_usage_stats",
            "stream_options.continuous_usage_stats needs stream_options.include_usage to be true",
        )


def token_logprob(model: Servable, token: int, logprob: float) -> dict[str, Any]:
    """One token as the chat API shows it."""
    spelled = model.tokenizer.token_bytes(token)
    return {"token": spelled.decode(errors="replace"), "logprob": logprob, "bytes": list(spelled)}


def bytes_or_text(model: Servable, token: int) -> str:
    """One token as the completions API shows it: text, or 'bytes:\\x..' where it is no whole character."""
    spelled = model.tokenizer.token_bytes(token)
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def shown(scores: list[TokenScore]) -> list[TokenScore]:
    """Those of tokens that are part of the text."""
    return [score for score in scores if score.in_text]
