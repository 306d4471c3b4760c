"""The requests that no engine has yet, of all models, and what each model's come to."""

from collections.abc import Iterator

from prism.scheduling.admission.policy import QueuedRequest


class RequestQueue:
    """Queued requests by id, in the order in which they came.

    How many of a model there are, and how many KV tokens they will probably take, is known without looking
    at any: it is asked several times a second for each model, also when thousands wait.
    """

    def __init__(self) -> None:
        self._entries: dict[str, QueuedRequest] = {}
        self._of_model: dict[str, dict[str, QueuedRequest]] = {}
        self._tokens: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[QueuedRequest]:
        return iter(self._entries.values())

    def add(self, entry: QueuedRequest) -> None:
        """Take one more; its id must be new."""
        assert entry.rid not in self._entries, entry.rid
        self._entries[entry.rid] = entry
        self._of_model.setdefault(entry.model, {})[entry.rid] = entry
        self._tokens[entry.model] = self.tokens(entry.model) + entry.tokens

    def remove(self, rid: str) -> QueuedRequest:
        """Give one away. Raises KeyError when it isn't here."""
        entry = self._entries.pop(rid)
        mine = self._of_model[entry.model]
        del mine[rid]
        self._tokens[entry.model] -= entry.tokens
        if not mine:
            # Models come and go.
            del self._of_model[entry.model], self._tokens[entry.model]
        return entry

    def models(self) -> set[str]:
        """Those with a request here."""
        return set(self._of_model)

    def count(self, model: str) -> int:
        """Requests of `model`."""
        return len(self._of_model.get(model, ()))

    def tokens(self, model: str) -> int:
        """KV tokens that the requests of `model` will probably take."""
        return self._tokens.get(model, 0)

    def ids(self, model: str) -> list[str]:
        """Those of the requests of `model`, in the order in which they came."""
        return list(self._of_model.get(model, ()))
