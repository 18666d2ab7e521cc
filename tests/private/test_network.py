"""The emulated network: what it is asked for against a clock of the test's own, and a private run over it."""

from __future__ import annotations

import random
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from aero.errors import AeroError
from aero.private.messages import Address
from aero.private.network.emulation import Emulation
from aero.private.network.link import LAN, WAN, Network, network_named
from aero.private.watch import free_ports


@contextmanager
def emulated(text: str, parties: int = 2) -> Iterator[tuple[Emulation, list[Address]]]:
    network = network_named(text)
    assert network is not None
    ports = free_ports(2 * parties)
    addresses = [Address("127.0.0.1", ports[2 * rank], ports[2 * rank + 1]) for rank in range(parties)]
    emulation = Emulation(network, addresses)
    try:
        yield emulation, addresses
    finally:
        emulation.close()


def connect(emulation: Emulation, here: int, there: int, address: Address) -> tuple[socket.socket, socket.socket]:
    """A connection that ``here`` dials as the engine would, and its other end."""
    with socket.create_server((address.host, address.port)) as listener:
        link = emulation.seen_by(here)[there]
        near = socket.create_connection((link.host, link.port), timeout=30.0)
        far, _ = listener.accept()
    for end in (near, far):
        end.settimeout(30.0)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, far


def read(end: socket.socket, size: int) -> bytes:
    parts: list[bytes] = []
    while size:
        parts.append(end.recv(min(size, 2**16)))
        assert parts[-1]
        size -= len(parts[-1])
    return b"".join(parts)


def test_names_and_numbers() -> None:
    assert network_named("none") is None
    assert network_named("lan") is LAN
    assert network_named("wan") is WAN
    same = network_named("0.1gbps, 80ms")
    assert same is not None
    assert (same.bits_per_second, same.rtt) == pytest.approx((WAN.bits_per_second, WAN.rtt))
    assert str(LAN) == "1000 Mbps, 0.5 ms round trip"


@pytest.mark.parametrize(
    "text", ["", "fast", "100mbps", "80ms,100mbps", "1bps,1ms", "100gbps,1ms", "1mbps,11s", "-1mbps,1ms"]
)
def test_other_networks_are_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(AeroError, match=r"choose|out of range"):
        network_named(text)


def test_the_round_trip_and_the_rate_are_those_asked_for() -> None:
    with emulated("40mbps,30ms") as (emulation, addresses):
        (found,) = emulation.measured
        near, far = connect(emulation, 0, 1, addresses[1])
        with near, far:
            trips = []
            for _ in range(7):
                started = time.perf_counter()
                near.sendall(b"?")
                far.sendall(read(far, 1))
                read(near, 1)
                trips.append(time.perf_counter() - started)
            size = 1_500_000  # 0.3 s
            sender = threading.Thread(target=near.sendall, args=(bytes(size),))
            started = time.perf_counter()
            sender.start()
            read(far, size)
            seconds = time.perf_counter() - started
            sender.join()
    assert statistics.median(trips) == pytest.approx(0.030, abs=0.003)
    # The last byte arrives after the time on the wire and one delay.
    assert seconds == pytest.approx(size * 8 / 40e6 + 0.015, rel=0.08)
    assert found.rtt_ms == pytest.approx(30, abs=3)
    assert found.mbps == pytest.approx(40, rel=0.08)


def test_a_link_is_full_duplex_and_is_shared_by_the_connections_of_its_pair_alone() -> None:
    with emulated("40mbps,2ms", parties=3) as (emulation, addresses):
        size = 500_000  # 0.1 s
        ends = {
            "0>1": connect(emulation, 0, 1, addresses[1]),
            "0>1 again": connect(emulation, 0, 1, addresses[1]),
            "1>0": connect(emulation, 1, 0, addresses[0]),
            "0>2": connect(emulation, 0, 2, addresses[2]),
        }
        started, ended = time.perf_counter(), {}

        def carry(name: str) -> None:
            near, far = ends[name]
            sender = threading.Thread(target=near.sendall, args=(bytes(size),))
            sender.start()
            read(far, size)
            ended[name] = time.perf_counter() - started
            sender.join()

        threads = [threading.Thread(target=carry, args=(name,)) for name in ends]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for near, far in ends.values():
            near.close()
            far.close()
    once = size * 8 / 40e6
    shared = ended["0>1"], ended["0>1 again"]
    # Their threads begin when the machine lets them: later than the common start, never earlier.
    assert min(ended["1>0"], ended["0>2"]) > 0.95 * once
    # Two connections in one direction: the later one ends when both are through, and they took turns.
    assert max(shared) > 1.9 * once
    assert min(shared) > 1.3 * once
    assert max(ended["1>0"], ended["0>2"]) < 0.9 * max(shared)


def test_nothing_is_lost_or_reordered_and_an_end_arrives_behind_the_data() -> None:
    data = random.Random(0).randbytes(3_000_000)
    with emulated("200mbps,10ms") as (emulation, addresses):
        near, far = connect(emulation, 0, 1, addresses[1])
        with near, far:
            sender = threading.Thread(target=lambda: (near.sendall(data), near.shutdown(socket.SHUT_WR)))
            sender.start()
            time.sleep(0.3)  # a receiver that is slow to begin
            assert read(far, len(data)) == data
            assert far.recv(1) == b""
            sender.join()
            far.sendall(data[:1000])  # half closed: the other direction still works
            assert read(near, 1000) == data[:1000]


def test_a_party_that_is_not_there_refuses_the_connection() -> None:
    with emulated("100mbps,2ms") as (emulation, _):
        link = emulation.seen_by(0)[1]
        with socket.create_connection((link.host, link.port), timeout=10.0) as near:
            assert near.recv(1) == b""


def test_the_link_tells_what_it_carried() -> None:
    emulation = Emulation(Network(name="test", bits_per_second=80e6, rtt=4e-3), [Address("127.0.0.1", 1, 2)] * 2)
    told = emulation.close()
    assert (told["bandwidth_mbps"], told["rtt_ms"]) == (80, 4)
    forth, back = ({lane["from"]: lane["bytes"] for lane in told["carried"]}[rank] for rank in (0, 1))
    # The probe: pings both ways, and a bulk transfer of a quarter of a second one way.
    assert forth == back + 80e6 / 8 / 4
    assert 0 <= told["forwarder_cpu_share"] < 1


# Delays so long that a run in which a fifth of them is missing ends sooner than its messages should be under way, on a
# machine with nothing else to do.
@pytest.mark.parametrize(
    ("protocol", "rtt"), [("semi2k-insecure", 120), pytest.param("aby3", 160, marks=pytest.mark.slow)]
)
def test_a_private_run_over_it_gives_the_same_answer_and_waits_for_every_round(protocol: str, rtt: float) -> None:
    pytest.importorskip("spu")
    from aero.private.launch import local_parties, run_local
    from aero.private.messages import PartyJob, Request
    from aero.private.protocols import protocol_named

    parties = local_parties(protocol_named(protocol), None)
    job = PartyJob(protocol=protocol, parties=parties, rank=0, wait_seconds=120.0, embedding="client")
    request = Request(prompt=(3, 1401, 59, 265, 35, 897, 932, 384), keep_logits=True)
    bare = run_local(job, request, model="gpt2-tiny:SM+ScFuFFN")
    slow = run_local(job, request, model="gpt2-tiny:SM+ScFuFFN", network=network_named(f"500mbps,{rtt}ms"))
    assert bare.network is None
    assert bare.logits is not None
    assert slow.logits is not None
    assert abs(bare.logits - slow.logits).max() < 2e-3
    assert slow.prefill.total_bytes == bare.prefill.total_bytes
    # Every round waits for one way of the link at least; a round has at most one message of a party. A few are
    # under way together: at delays beside which computing is nothing, a run takes 0.97 of all of them or more.
    longest = slow.prefill.rounds * rtt / 2e3
    assert 0.95 * longest < slow.prefill.seconds < 2 * bare.prefill.seconds + 1.5 * longest
    # Three counters of the same bytes: the account, the operating system's and the link's own.
    assert slow.network is not None
    assert slow.system_bytes is not None
    carried = sum(lane["bytes"] for lane in slow.network["carried"])
    probes = len(parties) * (len(parties) - 1) / 2 * 500e6 / 8 / 4
    assert carried - probes == pytest.approx(sum(slow.system_bytes), rel=2e-3)
    for system, counted, messages in zip(slow.system_bytes, slow.counted_bytes, slow.counted_messages, strict=True):
        assert 0 <= system - counted <= 400 * messages + 64 * 1024
