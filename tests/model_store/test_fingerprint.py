"""A fingerprint changes with the model, and only then; its version does with the content alone."""

import os
from pathlib import Path

import pytest
from tests.model_store.model_folders import CONFIG, write_model

from prism.model_store.checkpoint import read_checkpoint
from prism.model_store.fingerprint import identity_of, signature_of

pytestmark = pytest.mark.core


def fingerprint(folder: Path) -> str:
    return identity_of(read_checkpoint(folder)).fingerprint


def version(folder: Path) -> str:
    return identity_of(read_checkpoint(folder)).version


def test_it_is_the_same_each_time_and_32_hex_digits(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    assert fingerprint(folder) == fingerprint(folder)
    assert len(bytes.fromhex(fingerprint(folder))) == 16


def test_it_does_not_depend_on_where_the_folder_is(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    before = fingerprint(folder), signature_of(folder)
    moved = folder.rename(tmp_path / "elsewhere")
    assert (fingerprint(moved), signature_of(moved)) == before


def test_changed_weights_change_it_even_with_the_old_size_and_time(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    weights = folder / "model.safetensors"
    before, status = fingerprint(folder), weights.stat()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprint(folder) != before


def test_a_touched_file_and_a_changed_config_change_it(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    seen = {fingerprint(folder)}
    os.utime(folder / "model.safetensors", ns=(1, 1))
    seen.add(fingerprint(folder))
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    seen.add(fingerprint(folder))
    other = write_model(tmp_path / "other", config=CONFIG | {"vocab_size": 99})
    seen.add(fingerprint(other))
    assert len(seen) == 4


def test_copies_of_other_times_are_the_same_version(tmp_path: Path) -> None:
    one, copy = write_model(tmp_path / "m"), write_model(tmp_path / "copy")
    os.utime(copy / "model.safetensors", ns=(1, 1))
    assert fingerprint(copy) != fingerprint(one)
    assert version(copy) == version(one)


def test_other_weights_and_another_config_are_other_versions(tmp_path: Path) -> None:
    seen = {version(write_model(tmp_path / "m", seed=1)), version(write_model(tmp_path / "n", seed=2))}
    seen.add(version(write_model(tmp_path / "o", seed=1, config=CONFIG | {"rope_theta": 99.0})))
    assert len(seen) == 3
