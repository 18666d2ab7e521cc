"""What a party sees of a secret: nothing but its size. Each test is also shown a leak, and must find it."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("spu")

from aero.private.launch import PrivateSession, local_parties
from aero.private.messages import PartyJob, Request
from aero.private.protocols import protocol_named

NUMBERS = 4096


def shares(protocol_name: str, secret: NDArray[np.float32]) -> dict[int, bytes]:
    """What each party holds of a secret of party 0 once the engine has shared it: all parties in threads, linked."""
    import jax
    import spu
    from spu import libspu
    from spu.utils import frontend

    from aero.private.engine import runtime_config

    protocol = protocol_named(protocol_name)
    world = len(protocol.roles)
    description = libspu.link.Desc()
    for rank in range(world):
        description.add_party(f"party {rank}", f"memory {rank}")
    visibility = libspu.Visibility.VIS_SECRET
    held: dict[int, bytes] = {}

    def party(rank: int) -> None:
        config = runtime_config(protocol, 1)
        config.enable_pphlo_profile = False
        runtime, io = spu.Runtime(libspu.link.create_mem(description, rank), config), spu.Io(world, config)
        zeros = np.zeros_like(secret)
        for name, owner in (("x", 0), ("zero", 1)):
            value = secret if (name, rank) == ("x", 0) else zeros
            runtime.set_var(name, io.make_shares(value, visibility, owner)[rank])
        arguments = [jax.ShapeDtypeStruct(secret.shape, np.float32)] * 2
        executable, _ = frontend.compile(
            frontend.Kind.JAX, _sum, arguments, {}, ["x", "zero"], [visibility] * 2, lambda _: ["y"]
        )
        runtime.run(executable)
        held[rank] = b"".join(bytes(chunk) for chunk in runtime.get_var("y").share_chunks)

    threads = [threading.Thread(target=party, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert sorted(held) == list(range(world))
    return held


def _sum(x: Any, y: Any) -> Any:
    return x + y


def unevenness(data: bytes) -> float:
    """Chi-square of byte values against the even distribution, as standard deviations from its mean (255, sd 22.6)."""
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    even = len(data) / 256
    return float((np.sum((counts - even) ** 2 / even) - 255) / np.sqrt(2 * 255))


@pytest.mark.parametrize("protocol", ["aby3", "semi2k-insecure"])
def test_a_partys_shares_of_a_fixed_secret_are_even_and_new_in_every_run(protocol: str) -> None:
    secret = np.full((NUMBERS // 64, 64), 1.5, np.float32)
    first, second = shares(protocol, secret), shares(protocol, secret)
    for rank, data in first.items():
        assert abs(unevenness(data)) < 5, rank
        # The same secret again: as far from the first time as any two random strings.
        same = np.mean(np.frombuffer(data, np.uint8) == np.frombuffer(second[rank], np.uint8))
        assert same < 0.01, rank
    # The number as it is encoded, unshared, would be found at once.
    assert unevenness(np.full(NUMBERS, int(1.5 * 2**20), np.int64).tobytes()) > 1000


@pytest.mark.parametrize("protocol", ["aby3", "semi2k-insecure"])
def test_a_partys_shares_do_not_correlate_with_the_secret(protocol: str) -> None:
    secret = np.random.default_rng(0).normal(size=(NUMBERS // 64, 64)).astype(np.float32)

    def correlation(data: bytes) -> float:
        words = np.frombuffer(data[len(data) % 8 :], np.int64).astype(np.float64)
        columns = words[-(len(words) // NUMBERS) * NUMBERS :].reshape(NUMBERS, -1)
        return max(abs(float(np.corrcoef(column, secret.ravel())[0, 1])) for column in columns.T)

    for rank, data in shares(protocol, secret).items():
        assert correlation(data) < 5 / np.sqrt(NUMBERS), rank
    masked = np.round(secret.ravel() * 2**20).astype(np.int64) + np.random.default_rng(1).integers(
        -(2**20), 2**20, NUMBERS
    )
    assert correlation(masked.tobytes()) > 0.5  # a mask as narrow as the secret does not hide it


def test_the_servers_view_has_one_shape_for_all_prompts_of_a_length() -> None:
    """Everything that the model's party notes of a request: phases, steps, bytes, messages, in their order."""
    protocol = protocol_named("semi2k-insecure")  # where what each party sends does not depend on timing
    job = PartyJob(protocol=protocol.name, parties=local_parties(protocol, None), rank=0, wait_seconds=120.0)
    generator = np.random.default_rng(0)
    with PrivateSession(job, model="gpt2-tiny:SM+ScFuFFN") as session:

        def view(length: int) -> list[tuple[Any, ...]]:
            prompt = tuple(generator.integers(0, 2048, length).tolist())
            result = session.ask(Request(prompt=prompt, new_tokens=2))
            accounts = [result.prefill, *result.tokens]
            return [
                (
                    account.bytes_by_party,
                    [(cost.operator, cost.layer, cost.bytes, cost.rounds) for cost in account.operators],
                )
                for account in accounts
            ]

        first = view(7)
        assert view(7) == first
        assert view(8) != first
