"""From a seed to masks: the same pseudorandom numbers that a party drew from it.

A party's engine encrypts a running 128-bit counter, little-endian, with AES-128 under the seed; block c of the stream
is AES(seed, c). A draw of n bytes takes ceil(n / 16) blocks and leaves the rest of the last one unused.
"""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

BLOCK = 16
_CHUNK = 1 << 16
"""Blocks encrypted at a time: counters and result of one mebibyte stay in the cache."""


def expand(seed: bytes, counter: int, size: int) -> NDArray[np.uint8]:
    """The ``size`` bytes that a party drew from ``seed`` when its counter stood at ``counter``; [size]."""
    blocks = -(-size // BLOCK)
    encryptor = Cipher(algorithms.AES(seed), modes.ECB()).encryptor()
    # The library wants room for one more block than it writes.
    stream = np.empty((blocks + 1) * BLOCK, np.uint8)
    counters = np.zeros((min(blocks, _CHUNK), 2), "<u8")
    for start in range(0, blocks, _CHUNK):
        count = min(_CHUNK, blocks - start)
        counters[:count, 0] = np.arange(counter + start, counter + start + count, dtype=np.uint64)
        begin = start * BLOCK
        encryptor.update_into(counters[:count].data.cast("B"), stream[begin : begin + (count + 1) * BLOCK].data)
    return stream[:size]


def shuffle(seed: bytes, counter: int, size: int) -> NDArray[np.int64]:
    """The permutation of ``size`` things that a party drew: Durstenfeld's shuffle, from the last place down; [size].

    Its 128-bit numbers come from AES in counter mode proper, whose first block is the little-endian counter read as one
    big-endian number. Place i swaps with the i-th number modulo i + 1.
    """
    encryptor = Cipher(algorithms.AES(seed), modes.CTR(counter.to_bytes(BLOCK, "little"))).encryptor()
    words = np.frombuffer(encryptor.update(bytes(BLOCK * max(0, size - 1))), "<u8").reshape(-1, 2)
    modulus = np.arange(2, size + 1, dtype=np.uint64)
    # 2^64 = (2^64 - 1) + 1; sizes below 2^32 keep the products within 64 bits.
    power = (np.uint64(2**64 - 1) % modulus + np.uint64(1)) % modulus
    places = (words[:, 1] % modulus * power % modulus + words[:, 0] % modulus) % modulus
    order = np.arange(size, dtype=np.int64)
    for place in range(size - 1, 0, -1):
        other = int(places[place - 1])
        order[place], order[other] = order[other], order[place]
    return order
