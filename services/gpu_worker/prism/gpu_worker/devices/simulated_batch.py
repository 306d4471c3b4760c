"""The requests of one simulated engine, step by step: no clock, no I/O.

As an engine does it: prompts are prefilled first, in chunks, oldest first; the step that ends a prompt brings
its first token; otherwise each step brings one token of every running request.
"""

from collections import deque
from dataclasses import dataclass

from prism.common.messages.generation import TokenLogprob
from prism.gpu_worker.devices.simulated_tokens import MakeTokens, TokenSource
from prism.gpu_worker.engine_protocol import Generate, TokenOutput


@dataclass(slots=True)
class _Running:
    request: Generate
    tokens: TokenSource
    prefilled: int = 0
    generated: int = 0

    @property
    def to_prefill(self) -> int:
        """What it has said before it was retracted is prefilled with its prompt."""
        return len(self.request.input_ids) + self.generated


class SimulatedBatch:
    """Queued and running requests."""

    def __init__(self, make_tokens: MakeTokens, *, max_running: int, chunk_tokens: int) -> None:
        self._make_tokens = make_tokens
        self._max_running = max_running
        self._chunk_tokens = chunk_tokens
        self._waiting: deque[_Running] = deque()
        self._running: dict[str, _Running] = {}
        self.steps = 0
        self.limit_tokens: int | None = None
        """Tokens that there is room for; None: no limit. One request runs whatever it takes."""

    @property
    def running(self) -> int:
        """Requests whose prompt is done."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests whose prompt is not done."""
        return len(self._waiting)

    @property
    def kv_tokens(self) -> int:
        """Tokens that the requests here hold."""
        held = sum(len(each.request.input_ids) + each.generated for each in self._running.values())
        return held + sum(each.prefilled for each in self._waiting)

    def add(self, request: Generate) -> None:
        """Queue a request."""
        self._waiting.append(_Running(request, self._make_tokens(len(request.input_ids))))

    def abort(self, rid: str) -> list[TokenOutput]:
        """Drop every request whose rid begins with `rid`, as SGLang does; their last outputs."""
        gone = [running for running in self._running if running.startswith(rid)]
        gone += [each.request.rid for each in self._waiting if each.request.rid.startswith(rid)]
        for each in gone:
            self._running.pop(each, None)
        self._waiting = deque(each for each in self._waiting if each.request.rid not in gone)
        return [TokenOutput(each, [], "abort") for each in gone]

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens of the next step; 0 when it decodes."""
        return sum(tokens for _, tokens in self._next_pass())

    def _next_pass(self) -> list[tuple[_Running, int]]:
        """Whose prompts the next step prefills, and how many tokens of each: the oldest first, up to a chunk
        in all, as long as there is room."""
        taken: list[tuple[_Running, int]] = []
        tokens, held = 0, self.kv_tokens
        for each in self._waiting:
            running = len(self._running) + len(taken)
            left = each.to_prefill - each.prefilled
            full = self.limit_tokens is not None and held + tokens + left >= self.limit_tokens
            if tokens >= self._chunk_tokens or running >= self._max_running or (running and full):
                break
            part = min(self._chunk_tokens - tokens, left)
            taken.append((each, part))
            tokens += part
        return taken

    def make_room(self, tokens: int = 0) -> int:
        """Have room for `tokens` more within the limit: the requests of lowest priority, the youngest first,
        wait until there is some again. One goes on in any case. Returns how many were retracted."""
        retracted = 0
        while self.limit_tokens is not None and self.kv_tokens + tokens > self.limit_tokens:
            if len(self._running) <= 1:
                break
            youngest = list(reversed(self._running.values()))
            lowest = min(youngest, key=lambda each: each.request.priority)
            del self._running[lowest.request.rid]
            lowest.prefilled = 0
            self._waiting.appendleft(lowest)
            retracted += 1
        return retracted

    def restamp(self, now_us: int) -> None:
        """What the last step brought leaves at `now_us` microseconds, later than it was computed."""
        for each in self._running.values():
            each.tokens.restamp(now_us)

    def step(self, now_us: int) -> list[TokenOutput]:
        """Do the next step, at `now_us` microseconds; what it brought."""
        self.steps += 1
        prefilled = self._next_pass()
        if not prefilled:
            self.make_room(len(self._running))
            return [self._next(each, now_us) for each in list(self._running.values())]
        brought = []
        for each, tokens in prefilled:
            each.prefilled += tokens
            if each.prefilled < each.to_prefill:
                break
            self._waiting.popleft()
            self._running[each.request.rid] = each
            brought.append(self._next(each, now_us))
        return brought

    def _next(self, each: _Running, now_us: int) -> TokenOutput:
        request, sampling = each.request, each.request.sampling
        token = each.tokens.next(now_us)
        each.generated += 1
        finish, matched = "", None
        if token in sampling.stop_token_ids and each.generated >= sampling.min_new_tokens:
            finish, matched = "stop", token
        elif each.generated >= sampling.max_new_tokens:
            finish = "length"
        if finish:
            del self._running[request.rid]
        logprobs = None
        if request.top_logprobs is not None:
            # Nothing else could have been said here.
            logprobs = [TokenLogprob(0.0, [(token, 0.0)] if request.top_logprobs else [])]
        if not finish:
            return TokenOutput(request.rid, [token], logprobs=logprobs)
        return TokenOutput(
            request.rid,
            [token],
            finish,
            matched,
            prompt_tokens=len(request.input_ids),
            completion_tokens=each.generated,
            logprobs=logprobs,
        )
