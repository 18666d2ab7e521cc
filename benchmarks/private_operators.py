"""Published forms of single operators, run by real parties in this package's engine: what they cost side by side.

Each form is written from the formulas of its paper, on the shapes of one layer, and computes the full square of
attention as the published programs do. Costs depend on shapes alone, so the inputs are random.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

Shapes = list[tuple[int, ...]]


def _puma_softmax(x: Any) -> Any:
    """PUMA (arXiv 2307.12533), section 4.2: maximum, (1 + x/2^5)^(2^5) above -14, one reciprocal a row."""
    import jax.numpy as jnp

    y = x - jnp.max(x, axis=-1, keepdims=True)
    base = 1.0 + y * (1.0 / 32)
    for _ in range(5):
        base = base * base
    e = jnp.where(y > -14.0, base, 0.0)
    return e * (1.0 / jnp.sum(e, axis=-1, keepdims=True))


def _puma_gelu(x: Any) -> Any:
    """PUMA, section 4.1: 0, a cubic, a sextic and x, on four intervals with three comparisons."""
    import jax.numpy as jnp

    x2 = x * x
    x3 = x2 * x
    x4, x6 = x2 * x2, x3 * x3
    low = -0.5054031199708174 - 0.42226581151983866 * x - 0.11807612951181953 * x2 - 0.011034134030615728 * x3
    middle = 0.008526321541038084 + 0.5 * x + 0.3603292692789629 * x2
    middle = middle - 0.037688200365904236 * x4 + 0.0018067462606141187 * x6
    return jnp.where(x < -4.0, 0.0, jnp.where(x < -1.95, low, jnp.where(x > 3.0, x, middle)))


def _puma_layernorm(x: Any, weight: Any, bias: Any) -> Any:
    """PUMA, section 4.3: one reciprocal root a row, then the affine part with secret weights."""
    import jax
    import jax.numpy as jnp

    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    root = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + 1e-5)
    return centred * root * weight + bias


def _two_quad(x: Any) -> Any:
    """2Quad of MPCFormer (arXiv 2211.01452) and SecFormer (arXiv 2401.00793): (x + 5)^2 over its row's sum."""
    import jax.numpy as jnp

    square = (x + 5.0) * (x + 5.0)
    return square * (1.0 / jnp.sum(square, axis=-1, keepdims=True))


def _quad(x: Any) -> Any:
    """Quad of MPCFormer in GELU's place: x^2/8 + x/4 + 1/2."""
    return 0.125 * (x * x) + 0.25 * x + 0.5


def _attention(config: Any, tokens: int) -> Shapes:
    return [(config.heads, tokens, tokens)]


def _hidden(config: Any, tokens: int) -> Shapes:
    return [(tokens, config.ffn_width)]


def _stream(config: Any, tokens: int) -> Shapes:
    return [(tokens, config.width), (config.width,), (config.width,)]


FORMS: dict[str, tuple[Callable[..., Any], Callable[[Any, int], Shapes]]] = {
    "softmax, PUMA's form, one layer": (_puma_softmax, _attention),
    "GELU, PUMA's form, one layer": (_puma_gelu, _hidden),
    "LayerNorm, PUMA's form, one": (_puma_layernorm, _stream),
    "softmax, 2Quad (MPCFormer, SecFormer), one layer": (_two_quad, _attention),
    "GELU, Quad (MPCFormer), one layer": (_quad, _hidden),
}
"""Label -> the form and the shapes of its inputs."""


def measure_form(name: str, shape: str, tokens: int, protocol: str, network: str) -> dict[str, Any]:
    """Run the form with every party as a process of its own; a document as ``aero private bench`` writes it."""
    from aero import provenance
    from aero.config import shape_named
    from aero.private.account import PartyCost, combine
    from aero.private.launch import local_parties
    from aero.private.network.emulation import Emulation
    from aero.private.network.link import network_named
    from aero.private.protocols import protocol_named

    chosen, link = protocol_named(protocol), network_named(network)
    shapes = FORMS[name][1](shape_named(shape), tokens)
    parties = local_parties(chosen, None)
    emulation = None if link is None else Emulation(link, parties)
    threads = max(1, (os.cpu_count() or 1) // len(parties))
    processes = []
    for rank in range(len(parties)):
        seen = parties if emulation is None else emulation.seen_by(rank)
        job = {"form": name, "protocol": protocol, "rank": rank, "shapes": shapes, "addresses": [str(a) for a in seen]}
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_THREAD_LIMIT": str(threads)}
        processes.append(
            subprocess.Popen(
                [sys.executable, __file__, json.dumps({**job, "threads": threads})],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
            )
        )
    told = [process.communicate()[0] for process in processes]
    measured = None if emulation is None else emulation.close()
    if any(process.returncode for process in processes):
        return {"failed": f"the form did not run under {protocol}"}
    found = [json.loads(text.splitlines()[-1]) for text in told]
    account = combine([[PartyCost(**cost) for cost in each["costs"]] for each in found])
    return {
        "model": name,
        "protocol": protocol,
        "trust_model": chosen.trust.to_dict(),
        **account.to_dict(),
        "offline": {"bytes": 0},
        "link": {
            "network": network,
            "emulation": measured,
            "system_bytes": [each["system"] for each in found],
            "counted_bytes": [each["counted"] for each in found],
            "counted_messages": [each["messages"] for each in found],
        },
        "commit": provenance.commit(),
        "date": provenance.now(),
    }


def _party(job: dict[str, Any]) -> None:
    import numpy as np

    from aero.private.engine import Engine
    from aero.private.program import Step
    from aero.private.protocols import protocol_named
    from aero.private.traffic import tcp_traffic

    protocol = protocol_named(job["protocol"])
    engine = Engine(protocol, job["rank"], job["addresses"], job["threads"], connect_seconds=60.0)
    engine.start()
    names = tuple(f"in{index}" for index in range(len(job["shapes"])))
    random = np.random.default_rng(0)
    for name, shape in zip(names, job["shapes"], strict=True):
        # The model owner's and the client's halves of a sum: the form finds its input shared.
        for owner, part in enumerate((name, "half")):
            value = random.uniform(-1, 1, shape)
            engine.enter(part, tuple(shape), owner, value if job["rank"] == owner else None)
        engine.run([Step("sharing", None, _sum, (name, "half"), (name,))])
    engine.warm_up()
    step = Step(job["form"], None, FORMS[job["form"]][0], names, ("out",))
    engine.prepare(([step], {}))
    engine.barrier()
    before = engine.take_costs()
    engine.run([step])
    costs = engine.take_costs()
    engine.barrier()
    traffic = tcp_traffic(without_ports=set())
    every = [*before, *costs]
    result = {
        "costs": [asdict(cost) for cost in costs],
        "counted": sum(cost.bytes for cost in every),
        "messages": sum(cost.rounds for cost in every),
        "system": None if traffic is None else traffic.bytes_sent,
    }
    engine.barrier()
    print(json.dumps(result), flush=True)
    sys.stdout.flush()
    engine.close()
    os._exit(0)


def _sum(x: Any, y: Any) -> Any:
    return x + y


if __name__ == "__main__":
    _party(json.loads(sys.argv[1]))
