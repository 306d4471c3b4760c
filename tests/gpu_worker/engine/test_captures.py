"""What has to be over before a CUDA graph is captured."""

from prism.gpu_worker.engine.captures import wait_before_each


def test_each_capture_begins_after_what_it_waits_for() -> None:
    happened: list[object] = []

    class Graph:
        def capture_begin(self, pool: int, capture_error_mode: str = "global") -> None:
            happened.append((pool, capture_error_mode))

    wait_before_each(Graph, lambda: happened.append("waited"))
    Graph().capture_begin(7, capture_error_mode="relaxed")
    Graph().capture_begin(8)
    assert happened == ["waited", (7, "relaxed"), "waited", (8, "global")]
