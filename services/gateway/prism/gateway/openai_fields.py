"""What /v1/chat/completions and /v1/completions share: parameters, and their meaning."""

from typing import Any

import msgspec

from prism.common.errors import ErrorCode, PrismError
from prism.gateway.plan import Servable
from prism.gateway.request_fields import invalid, refuse_unsupported
from prism.gateway.sampling import SamplingFields, check_sampling
from prism.gateway.text_assembler import TokenScore


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


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
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that holds the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


HARMLESS_EVERYWHERE: dict[str, tuple[Any, ...]] = {"store": (False,)}


def check_fields(request: OpenAIFields, harmless: dict[str, tuple[Any, ...]]) -> None:
    """Raises PrismError for what is out of range or not supported."""
    refuse_unsupported(msgspec.structs.asdict(request), {**HARMLESS_EVERYWHERE, **harmless})
    if request.stream_options and request.stream_options.include_obfuscation:
        raise PrismError(
            ErrorCode.UNSUPPORTED,
            "stream_options.include_obfuscation is not supported; leave it out",
            param="stream_options.include_obfuscation",
        )
    check_sampling(request)
    if not request.model:
        raise invalid("model", "model must not be empty")


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
