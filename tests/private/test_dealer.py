"""The dealer's parts against slow and obvious versions, and its answers against what a triple must satisfy."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from aero.errors import AeroError
from aero.private.dealer.access import DealerAccess, read_public_key
from aero.private.dealer.adjust import Adjuster
from aero.private.dealer.expand import expand, shuffle
from aero.private.dealer.key import KeyPair
from aero.private.dealer.product import matmul
from aero.private.dealer.wire import Draw, Request, decode

SEEDS = (b"first party seed", b"another's secret")


def stream(seed: bytes, counter: int, size: int) -> bytes:
    cipher = Cipher(algorithms.AES(seed), modes.ECB()).encryptor()
    blocks = [cipher.update(block.to_bytes(16, "little")) for block in range(counter, counter + -(-size // 16))]
    return b"".join(blocks)[:size]


def drawn(draw: Draw, element_bytes: int) -> list[list[int]]:
    """The numbers that each party drew."""
    shares = []
    for seed in draw.seeds:
        data = stream(seed, draw.counter, draw.size)
        parts = (data[at : at + element_bytes] for at in range(0, draw.size, element_bytes))
        shares.append([int.from_bytes(part, "little") for part in parts])
    return shares


def added(shares: Sequence[Sequence[int]], modulus: int) -> list[int]:
    return [sum(each) % modulus for each in zip(*shares, strict=True)]


def answer(method: str, sizes: Sequence[int], parties: int = 2, **fields: object) -> tuple[Request, list[list[int]]]:
    seeds = (*SEEDS, b"a third one here")[:parties]
    draws = tuple(Draw(100 * index, size, seeds) for index, size in enumerate(sizes))
    request = Request(method=method, draws=draws, **fields)  # type: ignore[arg-type]
    return request, [array.tolist() for array in Adjuster(lambda seed: seed).answer(request)]


@pytest.mark.parametrize("size", [1, 16, 40, 16 * (2**16 + 3) + 5])
def test_a_draw_is_the_encrypted_counter(size: int) -> None:
    assert bytes(expand(SEEDS[0], 7, size)) == stream(SEEDS[0], 7, size)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 2500), st.integers(1, 12), st.integers(0, 2**32), st.booleans())
def test_a_product_is_exact_in_the_ring(rows: int, inner: int, columns: int, seed: int, extreme: bool) -> None:
    random = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        if not extreme:
            return random.integers(0, 2**64, shape, np.uint64)
        # Large digits of one sign: the sums of products that come closest to losing bits.
        low, middle = random.integers(2**21 - 1000, 2**21, (2, *shape)).astype(np.uint64)
        return low + (middle << np.uint64(22)) + (np.uint64(2**19 - 1) << np.uint64(44))

    a, b = draw(rows, inner), draw(inner, columns)
    assert np.array_equal(matmul(a, b), a @ b)
    small = a.astype(np.uint32), b.astype(np.uint32)
    assert np.array_equal(matmul(*small), small[0] @ small[1])


def test_a_shuffle_is_durstenfelds() -> None:
    counter, size = 300, 50
    cipher = Cipher(algorithms.AES(SEEDS[0]), modes.CTR(counter.to_bytes(16, "little"))).encryptor()
    data = cipher.update(bytes(16 * (size - 1)))
    order = list(range(size))
    for place in range(size - 1, 0, -1):
        other = int.from_bytes(data[16 * (place - 1) : 16 * place], "little") % (place + 1)
        order[place], order[other] = order[other], order[place]
    assert shuffle(SEEDS[0], counter, size).tolist() == order


@pytest.mark.parametrize("element_bytes", [4, 8])
@pytest.mark.parametrize("parties", [2, 3])
def test_adjusted_shares_satisfy_their_equation(element_bytes: int, parties: int) -> None:
    bits, modulus, count = 8 * element_bytes, 2 ** (8 * element_bytes), 12
    sizes = [count * element_bytes] * 3

    def shares(request: Request) -> list[list[list[int]]]:
        return [drawn(draw, element_bytes) for draw in request.draws]

    def corrected(whole: list[int], adjustment: list[int]) -> list[int]:
        return [(value + by) % modulus for value, by in zip(whole, adjustment, strict=True)]

    request, (by,) = answer("AdjustMul", sizes, parties, element_bytes=element_bytes)
    a, b, c = (added(each, modulus) for each in shares(request))
    assert corrected(c, by) == [x * y % modulus for x, y in zip(a, b, strict=True)]

    request, (by,) = answer("AdjustSquare", sizes[:2], parties, element_bytes=element_bytes)
    a, b = (added(each, modulus) for each in shares(request))
    assert corrected(b, by) == [x * x % modulus for x in a]

    request, (by,) = answer("AdjustTrunc", sizes[:2], parties, element_bytes=element_bytes, bits=5)
    a, b = (added(each, modulus) for each in shares(request))
    assert corrected(b, by) == [((x - modulus if x >> (bits - 1) else x) >> 5) % modulus for x in a]

    request, (by, top) = answer("AdjustTruncPr", sizes, parties, element_bytes=element_bytes, bits=5)
    a, b, c = (added(each, modulus) for each in shares(request))
    assert corrected(b, by) == [x % (modulus // 2) >> 5 for x in a]
    assert corrected(c, top) == [x >> (bits - 1) for x in a]

    request, (by,) = answer("AdjustRandBit", sizes[:1], parties, element_bytes=element_bytes)
    assert set(corrected(added(shares(request)[0], modulus), by)) == {0, 1}

    request, (by,) = answer("AdjustEqz", sizes[:2], parties, element_bytes=element_bytes)
    a, b = shares(request)
    mixed = [int(np.bitwise_xor.reduce(np.array(each, np.uint64))) for each in zip(*b, strict=True)]
    assert [x ^ y for x, y in zip(mixed, by, strict=True)] == added(a, modulus)

    order = shuffle(SEEDS[1], 9, count).tolist()
    request, (by,) = answer(
        "AdjustPerm", sizes[:2], parties, element_bytes=element_bytes, shuffle=Draw(9, count, (SEEDS[1],))
    )
    a, b = (added(each, modulus) for each in shares(request))
    moved = corrected(b, by)
    assert [moved[order[place]] for place in range(count)] == a


def test_a_product_of_two_owners_and_of_bits() -> None:
    request, (by,) = answer("AdjustMulPriv", [96, 96])
    first, second = drawn(request.draws[0], 8)
    c = added(drawn(request.draws[1], 8), 2**64)
    assert [(x + y) % 2**64 for x, y in zip(c, by, strict=True)] == [
        x * y % 2**64 for x, y in zip(first, second, strict=True)
    ]
    request, (by,) = answer("AdjustAnd", [96] * 3)
    a, b, c = ([x ^ y for x, y in zip(*drawn(draw, 8), strict=True)] for draw in request.draws)
    assert [x ^ y for x, y in zip(c, by, strict=True)] == [x & y for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True)])
def test_a_matrix_triple(transposed: tuple[bool, bool]) -> None:
    rows, inner, columns = 3, 5, 4
    request, (by,) = answer(
        "AdjustDot",
        [rows * inner * 8, inner * columns * 8, rows * columns * 8],
        rows=rows,
        inner=inner,
        columns=columns,
        transposed=(*transposed, False),
    )
    a, b, c = (np.array(added(drawn(draw, 8), 2**64), object) for draw in request.draws)
    left = a.reshape(inner, rows).T if transposed[0] else a.reshape(rows, inner)
    right = b.reshape(columns, inner).T if transposed[1] else b.reshape(inner, columns)
    assert ((c + np.array(by, object)) % 2**64).tolist() == (left @ right % 2**64).reshape(-1).tolist()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": "AdjustMul", "sizes": [16, 16]}, "takes 3 draws"),
        ({"method": "AdjustMul", "sizes": [16, 16, 32]}, "differ in size"),
        ({"method": "AdjustMul", "sizes": [2**33] * 3}, "GiB"),
        ({"method": "AdjustMul", "sizes": [12] * 3}, "part of a number"),
        ({"method": "AdjustMul", "sizes": [32] * 3, "element_bytes": 16}, "not 2\\^128"),
        ({"method": "AdjustMul", "sizes": [32] * 3, "prime": True}, "no prime field"),
        ({"method": "AdjustTrunc", "sizes": [32] * 2, "bits": 64}, "truncates 64 bits"),
        ({"method": "AdjustDot", "sizes": [32] * 3}, "transposed"),
        (
            {"method": "AdjustDot", "sizes": [32] * 3, "transposed": (False,) * 3, "rows": 9, "inner": 9, "columns": 9},
            "shape 9 x 9",
        ),
        ({"method": "AdjustPerm", "sizes": [32] * 2, "shuffle": Draw(0, 3, SEEDS[:1])}, "as long as"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        answer(**fields)  # type: ignore[arg-type]


def test_requests_are_read_as_the_client_writes_them() -> None:
    seed = base64.b64encode(b"cipher").decode()
    body = {"prg_inputs": [{"buffer_len": 64, "encrypted_seeds": [seed, seed]}], "field_size": 8, "bits": 20}
    request = decode("AdjustTrunc", json.dumps(body).encode())
    assert request.draws == (Draw(0, 64, (b"cipher", b"cipher")),)
    assert (request.element_bytes, request.bits, request.prime) == (8, 20, False)
    body["element_type"] = "GFMP"
    assert decode("AdjustMul", json.dumps(body).encode()).prime
    with pytest.raises(ValueError, match="no method"):
        decode("Adjust", b"{}")
    for broken in (b"", b"[]", b"{}", b'{"prg_inputs": [{"buffer_len": -1}]}', b'{"prg_inputs": 3}'):
        with pytest.raises(ValueError, match="not a message of AdjustMul"):
            decode("AdjustMul", broken)


def test_a_key_opens_what_openssl_seals_and_nothing_else(tmp_path: Path) -> None:
    key, other = KeyPair(), KeyPair()
    (tmp_path / "key").write_text(key.public)
    sealing = ["openssl", "pkeyutl", "-encrypt", "-pubin", "-inkey", str(tmp_path / "key")]
    try:
        done = subprocess.run(sealing, input=SEEDS[0], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    if done.returncode:
        pytest.skip("this openssl has no SM2")
    assert key.decrypt(done.stdout) == SEEDS[0]
    for holder, sealed in ((other, done.stdout), (key, done.stdout[:-1] + b"\0"), (key, b"x"), (key, b"")):
        with pytest.raises(ValueError, match="not encrypted for this dealer"):
            holder.decrypt(sealed)
    assert read_public_key(tmp_path / "key") == key.public
    (tmp_path / "key").write_text("something else")
    with pytest.raises(AeroError, match="not a dealer's public key"):
        read_public_key(tmp_path / "key")


def test_the_settings_are_those_the_engine_reads() -> None:
    libspu = pytest.importorskip("spu").libspu
    access = DealerAccess(host="192.0.2.1", port=9449, public_key=KeyPair().public, authority="/some/ca.pem")
    config = libspu.RuntimeConfig(libspu.ProtocolKind.SEMI2K, libspu.FieldType.FM64, 18)
    assert config.ParseFromString(config.SerializeToString() + access.settings(1))
    # Read into the engine's own object and written again: what it did not know would be gone.
    assert access.settings(1) in config.SerializeToString()
