"""What is remembered of an engine, for a run after one that was killed."""

from dataclasses import replace
from pathlib import Path

import pytest
from tests.compose.engine_record import EngineRecord, read_engine_record
from tests.compose.host_network import HostNetwork

pytestmark = pytest.mark.core

BEFORE = HostNetwork({"iptables": "*filter\n"}, {"net/ipv4/ip_forward": "0\n"}, frozenset({"lo", "eth0"}))


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = EngineRecord.of_this_run(tmp_path / "engine", BEFORE)
    record.write(tmp_path / "docker.json")
    assert read_engine_record(tmp_path / "docker.json") == record
    assert read_engine_record(tmp_path / "other.json") is None


def test_a_run_is_told_from_a_later_process_with_its_number() -> None:
    record = EngineRecord.of_this_run(Path("/engine"), BEFORE)
    assert record.run_is_on()
    assert not replace(record, began=record.began - 100).run_is_on()


def test_a_record_from_before_the_machine_started_means_nothing(tmp_path: Path) -> None:
    path = tmp_path / "docker.json"
    EngineRecord.of_this_run(tmp_path, BEFORE).write(path)
    path.write_text(path.read_text().replace('"boot": "', '"boot": "an earlier one'))
    assert read_engine_record(path) is None
