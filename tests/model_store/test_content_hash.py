"""The hash of an image that threads share."""

import pytest
import xxhash

from prism.model_store.content_hash import BLOCK_BYTES, hash_of_blocks, hash_of_image

pytestmark = pytest.mark.core
CONTENT = bytes(range(256)) * (2 * BLOCK_BYTES // 256) + b"the beginning of a third block"


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_comes_to_the_same(threads: int) -> None:
    blocks = [CONTENT[offset : offset + BLOCK_BYTES] for offset in range(0, len(CONTENT), BLOCK_BYTES)]
    expected = hash_of_blocks(xxhash.xxh3_128_digest(block) for block in blocks)
    assert hash_of_image(memoryview(CONTENT), threads) == expected


@pytest.mark.parametrize("position", [0, BLOCK_BYTES - 1, BLOCK_BYTES, len(CONTENT) - 1])
def test_any_other_byte_is_another_hash(position: int) -> None:
    changed = bytearray(CONTENT)
    changed[position] ^= 1
    assert hash_of_image(memoryview(changed)) != hash_of_image(memoryview(CONTENT))


def test_the_order_of_blocks_counts() -> None:
    assert hash_of_blocks([b"a", b"b"]) != hash_of_blocks([b"b", b"a"])
