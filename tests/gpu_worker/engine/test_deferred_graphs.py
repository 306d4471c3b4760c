"""CUDA graphs wait until an engine has been idle for a while."""

import pytest

from prism.gpu_worker.engine.deferred_graphs import DeferredGraphs


def runner_class() -> type:
    """A class as SGLang's ModelRunner, as far as its capture goes."""

    class Runner:
        decode_cuda_graph_runner: object = "not looked at"
        graph_mem_usage = -1

        def init_decode_cuda_graph(self) -> None:
            self.decode_cuda_graph_runner = "captured"

    return Runner


def test_an_engine_starts_without_graphs_and_gets_them_when_it_has_been_quiet() -> None:
    made = runner_class()
    graphs = DeferredGraphs(made, quiet_s=2.0)
    runner = made()
    runner.init_decode_cuda_graph()
    assert (runner.decode_cuda_graph_runner, runner.graph_mem_usage) == (None, 0)
    for now in (10.0, 11.0, 11.9):
        graphs.idle(5, now)
        assert runner.decode_cuda_graph_runner is None
    graphs.idle(5, 12.0)
    assert runner.decode_cuda_graph_runner == "captured"
    assert not graphs.pending


def test_work_in_between_starts_the_quiet_anew() -> None:
    made = runner_class()
    graphs = DeferredGraphs(made, quiet_s=2.0)
    runner = made()
    runner.init_decode_cuda_graph()
    graphs.idle(5, 10.0)
    graphs.idle(9, 12.5)
    graphs.idle(9, 14.4)
    assert graphs.pending
    graphs.idle(9, 14.5)
    assert not graphs.pending


def test_graphs_are_captured_once() -> None:
    made = runner_class()
    graphs = DeferredGraphs(made, quiet_s=0.0)
    runner = made()
    runner.init_decode_cuda_graph()
    graphs.idle(1, 1.0)
    graphs.idle(1, 1.0)
    runner.decode_cuda_graph_runner = "kept"
    graphs.idle(1, 9.0)
    assert runner.decode_cuda_graph_runner == "kept"


def test_an_image_that_is_copied_out_is_waited_for() -> None:
    made = runner_class()
    graphs = DeferredGraphs(made, quiet_s=2.0)
    runner = made()
    runner.init_decode_cuda_graph()
    graphs.idle(5, 10.0, exporting=True)
    graphs.idle(5, 15.0, exporting=True)
    assert graphs.pending, "a capture and the copy's waiting for the GPU would break each other"
    graphs.idle(5, 15.1)
    assert runner.decode_cuda_graph_runner == "captured", "it has been quiet for long"


def test_sleep_is_no_quiet_time() -> None:
    made = runner_class()
    graphs = DeferredGraphs(made, quiet_s=2.0)
    runner = made()
    runner.init_decode_cuda_graph()
    graphs.idle(5, 10.0)
    graphs.begin_anew()
    graphs.idle(5, 100.0)
    assert graphs.pending, "the request that it woke for comes first"
    graphs.idle(5, 102.0)
    assert not graphs.pending


def test_an_engine_that_cannot_capture_goes_on_without(caplog: pytest.LogCaptureFixture) -> None:
    class Full(runner_class()):  # type: ignore[misc]
        def init_decode_cuda_graph(self) -> None:
            self.decode_cuda_graph_runner = "half done"
            raise MemoryError("no room")

    graphs = DeferredGraphs(Full, quiet_s=0.0)
    runner = Full()
    runner.init_decode_cuda_graph()
    graphs.idle(1, 1.0)
    graphs.idle(1, 1.0)
    assert runner.decode_cuda_graph_runner is None
    assert "no room" in caplog.text
    assert not graphs.pending
