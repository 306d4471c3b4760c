"""What is known of each model's queued requests is what adding them up would say, whatever came and went."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism.gpu_worker.request_queue import RequestQueue
from prism.scheduling.admission.policy import QueuedRequest

pytestmark = pytest.mark.core


def request(rid: str, model: str, tokens: int) -> QueuedRequest:
    return QueuedRequest(rid, model, arrival_s=0.0, prompt_tokens=tokens, max_new_tokens=5, deadline_s=60.0)


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 50), st.integers(0, 30)), min_size=1, max_size=30
    )
)
def test_counts_and_tokens_are_those_of_the_requests_that_are_here(steps: list[tuple[str, int, int]]) -> None:
    queue = RequestQueue()
    here: list[QueuedRequest] = []
    for number, (model, tokens, gone) in enumerate(steps):
        here.append(request(f"r{number}", model, tokens))
        queue.add(here[-1])
        if gone < len(here):
            assert queue.remove(here[gone].rid) == here.pop(gone)
        assert list(queue) == here
        assert len(queue) == len(here)
        assert queue.models() == {each.model for each in here}
        for each in "abc":
            mine = [entry for entry in here if entry.model == each]
            assert queue.count(each) == len(mine)
            assert queue.tokens(each) == sum(entry.tokens for entry in mine)
            assert queue.ids(each) == [entry.rid for entry in mine]


def test_what_is_not_here_can_not_be_removed() -> None:
    queue = RequestQueue()
    queue.add(request("a", "m", 1))
    with pytest.raises(KeyError):
        queue.remove("b")
    assert queue.remove("a").rid == "a"
    with pytest.raises(KeyError):
        queue.remove("a")
