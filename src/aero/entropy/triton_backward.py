"""Triton kernels: gradients of attention and of its entropy, in one pass over the scores more than none.

With s the logits, p = softmax(s), lse their log-sum-exp and H the entropy, a loss with gradients dO and dH gives

    ds_j = p_j (dO . v_j - sum_c dO_c O_c - dH (s_j - lse + H))
         = p_j (dO . v_j - c - g x_j),      x_j = log2 p_j,   c = sum_c dO_c O_c + dH H,   g = ln 2 dH

x is what the softmax is recomputed from, and -(c + g x) is what the product dO v^T starts its sum from, where plain
attention starts from 0 and subtracts c afterwards: the gradient of the entropy adds no operation to the inner loop.

One program owns a block of keys, for which it sums over queries, and a block of queries, for which it sums over keys.
Nothing is added up by atomic operations: equal inputs give equal bits. Under a causal mask the two sums of a program
complement each other in length, so programs take equally long.
"""

from __future__ import annotations

import triton
import triton.language as tl

ABSENT = tl.constexpr(-1.0e4)
"""log2 p of a pair that the mask hides: 2^x is 0, and x times any gradient is finite."""
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def prepare_kernel(
    out_ptr, d_out_ptr, entropy_ptr, d_entropy_ptr, constant_ptr, slope_ptr,
    out_batch, out_head, out_row, d_out_batch, d_out_head, d_out_row, d_entropy_batch, d_entropy_head, d_entropy_row,
    heads, queries, size,
    SIZE: tl.constexpr, ENTROPY: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """c and g of every query; ENTROPY: dH is there (else g is not written). Grid: (query blocks, batch * heads)."""
    index = tl.program_id(1)
    batch = (index // heads).to(tl.int64)
    head = (index % heads).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, SIZE)
    inside = rows < queries
    held = inside[:, None] & (channels < size)[None, :]
    out_at = out_ptr + batch * out_batch + head * out_head + rows[:, None] * out_row + channels[None, :]
    d_out_at = d_out_ptr + batch * d_out_batch + head * d_out_head + rows[:, None] * d_out_row + channels[None, :]
    out = tl.load(out_at, mask=held, other=0.0).to(tl.float32)
    d_out = tl.load(d_out_at, mask=held, other=0.0).to(tl.float32)
    constant = tl.sum(out * d_out, 1)
    at = index.to(tl.int64) * queries + rows
    if ENTROPY:
        d_entropy_at = d_entropy_ptr + batch * d_entropy_batch + head * d_entropy_head + rows * d_entropy_row
        d_entropy = tl.load(d_entropy_at, mask=inside, other=0.0).to(tl.float32)
        constant += d_entropy * tl.load(entropy_ptr + at, mask=inside, other=0.0)
        tl.store(slope_ptr + at, d_entropy * LN2, mask=inside)
    tl.store(constant_ptr + at, constant, mask=inside)


@triton.jit
def load_rows(at, present, size, EDGE: tl.constexpr, PADDED: tl.constexpr, SIZE: tl.constexpr):
    """A tile [rows, channels]; EDGE: rows outside ``present`` are 0."""
    channels = tl.arange(0, SIZE)
    if EDGE:
        if PADDED:
            return tl.load(at, mask=present[:, None] & (channels < size)[None, :], other=0.0)
        return tl.load(at, mask=present[:, None], other=0.0)
    if PADDED:
        return tl.load(at, mask=(channels < size)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def sum_over_queries(
    dk, dv, k, v, q_rows, d_out_rows, q_step, d_out_step, lse_row, constant_row, slope_row, temperature_row,
    scale, first_seen_by, first_query, end_query, queries, size,
    SIZE: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr, ENTROPY: tl.constexpr,
    TEMPERATURE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dK and dV of a block of keys from the queries of one head between two bounds; scores are [keys, queries].

    first_seen_by: first query that sees each key. EDGE: some pairs may be hidden, or queries absent.
    """
    for start in range(first_query, end_query, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        present = rows < queries
        q = load_rows(q_rows + start * q_step, present, size, EDGE, PADDED, SIZE)
        if EDGE:
            lse = tl.load(lse_row + rows, mask=present, other=0.0)
            constant = tl.load(constant_row + rows, mask=present, other=0.0)
        else:
            lse = tl.load(lse_row + rows)
            constant = tl.load(constant_row + rows)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        if TEMPERATURE:
            factor = scale / tl.load(temperature_row + rows, mask=present, other=1.0)
            x = scores * (factor * LOG2E)[None, :] - lse[None, :]
        else:
            x = scores * (scale * LOG2E) - lse[None, :]
        if EDGE:
            visible = present[None, :]
            if CAUSAL:
                visible = visible & (rows[None, :] >= first_seen_by[:, None])
            x = tl.where(visible, x, ABSENT)
        p = tl.exp2(x)
        d_out = load_rows(d_out_rows + start * d_out_step, present, size, EDGE, PADDED, SIZE)
        dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
        origin = tl.zeros_like(x) - constant[None, :]
        if ENTROPY:
            slope = tl.load(slope_row + rows, mask=present, other=0.0) if EDGE else tl.load(slope_row + rows)
            origin -= slope[None, :] * x
        ds = p * tl.dot(v, tl.trans(d_out), origin, input_precision=PRECISION)
        if TEMPERATURE:
            ds = ds * factor[None, :]
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def sum_over_keys(
    dq, q, d_out, k_rows, v_rows, k_step, v_step, lse, constant, slope, factor, last,
    first_key, end_key, keys, size,
    SIZE: tl.constexpr, PADDED: tl.constexpr, EDGE: tl.constexpr, ENTROPY: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ / scale of a block of queries from the keys between two bounds; EDGE: some may be hidden or absent."""
    for start in range(first_key, end_key, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        present = columns < keys
        k = load_rows(k_rows + start * k_step, present, size, EDGE, PADDED, SIZE)
        v = load_rows(v_rows + start * v_step, present, size, EDGE, PADDED, SIZE)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor[:, None] - lse[:, None]
        if EDGE:
            x = tl.where(columns[None, :] <= last[:, None], x, ABSENT)
        p = tl.exp2(x)
        origin = tl.zeros_like(x) - constant[:, None]
        if ENTROPY:
            origin -= slope[:, None] * x
        ds = p * tl.dot(d_out, tl.trans(v), origin, input_precision=PRECISION)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def backward_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, dq_ptr, dk_ptr, dv_ptr, lse_ptr, constant_ptr, slope_ptr,
    temperature_ptr, d_temperature_ptr,
    scale,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, d_out_batch, d_out_head, d_out_row,
    dq_batch, dq_head, dq_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    heads, queries, keys, size,
    GROUP: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr, EVEN: tl.constexpr,
    ENTROPY: tl.constexpr, TEMPERATURE: tl.constexpr, PRECISION: tl.constexpr,
    HELD: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """dK, dV of one block of keys, and dQ of one block of queries of every head in its group.

    Grid: (larger number of blocks, batch * key/value heads). A program holds HELD keys while queries pass STEP at a
    time, then HELD queries while keys pass. EVEN: STEP divides the number of queries.
    d_temperature: gradient with respect to the temperature of each sample, [batch, heads, queries].
    """
    block = tl.program_id(0)
    key_heads = heads // GROUP
    batch = (tl.program_id(1) // key_heads).to(tl.int64)
    key_head = (tl.program_id(1) % key_heads).to(tl.int64)
    channels = tl.arange(0, SIZE)
    k_base = k_ptr + batch * k_batch + key_head * k_head
    v_base = v_ptr + batch * v_batch + key_head * v_head
    extra = keys - queries

    first = block * HELD
    if first < keys:
        columns = first + tl.arange(0, HELD)
        stored = (columns < keys)[:, None] & (channels < size)[None, :]
        k = tl.load(k_base + columns[:, None] * k_row + channels[None, :], mask=stored, other=0.0)
        v = tl.load(v_base + columns[:, None] * v_row + channels[None, :], mask=stored, other=0.0)
        dk = tl.zeros([HELD, SIZE], tl.float32)
        dv = tl.zeros([HELD, SIZE], tl.float32)
        first_seen_by = columns - extra
        if CAUSAL:
            start = tl.maximum(first - extra, 0) // STEP * STEP
            # From here on every query sees the whole block.
            plain = tl.cdiv(tl.maximum(first + HELD - 1 - extra, 0), STEP) * STEP
        else:
            start = 0
            plain = 0
        whole = queries // STEP * STEP
        steps = tl.arange(0, STEP)
        for member in range(GROUP):
            head = key_head * GROUP + member
            q_rows = q_ptr + batch * q_batch + head * q_head + steps[:, None] * q_row + channels[None, :]
            d_out_rows = (
                d_out_ptr + batch * d_out_batch + head * d_out_head + steps[:, None] * d_out_row + channels[None, :]
            )
            row = (batch * heads + head) * queries
            lse_row, constant_row, slope_row = lse_ptr + row, constant_ptr + row, slope_ptr + row
            temperature_row = temperature_ptr + head * queries
            if CAUSAL:
                dk, dv = sum_over_queries(
                    dk, dv, k, v, q_rows, d_out_rows, q_row, d_out_row, lse_row, constant_row, slope_row,
                    temperature_row, scale, first_seen_by, start, tl.minimum(plain, queries), queries, size,
                    SIZE, PADDED, True, True, ENTROPY, TEMPERATURE, PRECISION, STEP,
                )  # fmt: skip
            dk, dv = sum_over_queries(
                dk, dv, k, v, q_rows, d_out_rows, q_row, d_out_row, lse_row, constant_row, slope_row,
                temperature_row, scale, first_seen_by, plain, whole, queries, size,
                SIZE, PADDED, False, False, ENTROPY, TEMPERATURE, PRECISION, STEP,
            )  # fmt: skip
            if not EVEN:
                dk, dv = sum_over_queries(
                    dk, dv, k, v, q_rows, d_out_rows, q_row, d_out_row, lse_row, constant_row, slope_row,
                    temperature_row, scale, first_seen_by, tl.maximum(plain, whole), queries, queries, size,
                    SIZE, PADDED, CAUSAL, True, ENTROPY, TEMPERATURE, PRECISION, STEP,
                )  # fmt: skip
        if not TEMPERATURE:
            dk *= scale
        dk_at = dk_ptr + batch * dk_batch + key_head * dk_head + columns[:, None] * dk_row + channels[None, :]
        dv_at = dv_ptr + batch * dv_batch + key_head * dv_head + columns[:, None] * dv_row + channels[None, :]
        tl.store(dk_at, dk.to(dk_ptr.dtype.element_ty), mask=stored)
        tl.store(dv_at, dv.to(dv_ptr.dtype.element_ty), mask=stored)

    first = block * HELD
    if first < queries:
        rows = first + tl.arange(0, HELD)
        inside = rows < queries
        held = inside[:, None] & (channels < size)[None, :]
        steps = tl.arange(0, STEP)
        k_rows = k_base + steps[:, None] * k_row + channels[None, :]
        v_rows = v_base + steps[:, None] * v_row + channels[None, :]
        if CAUSAL:
            last = tl.minimum(rows + extra, keys - 1)
            plain = tl.minimum(first + extra + 1, keys) // STEP * STEP
            end = tl.minimum(first + HELD + extra, keys)
        else:
            last = tl.full([HELD], 0, tl.int32) + (keys - 1)
            plain = keys // STEP * STEP
            end = keys
        for member in range(GROUP):
            head = key_head * GROUP + member
            q_at = q_ptr + batch * q_batch + head * q_head + rows[:, None] * q_row + channels[None, :]
            d_out_at = (
                d_out_ptr + batch * d_out_batch + head * d_out_head + rows[:, None] * d_out_row + channels[None, :]
            )
            q = tl.load(q_at, mask=held, other=0.0)
            d_out = tl.load(d_out_at, mask=held, other=0.0)
            row = (batch * heads + head) * queries + rows
            lse = tl.load(lse_ptr + row, mask=inside, other=0.0)
            constant = tl.load(constant_ptr + row, mask=inside, other=0.0)
            slope = tl.load(slope_ptr + row, mask=inside, other=0.0) if ENTROPY else constant
            if TEMPERATURE:
                temperature = tl.load(temperature_ptr + head * queries + rows, mask=inside, other=1.0)
                factor = scale / temperature
            else:
                factor = tl.full([HELD], 1.0, tl.float32) * scale
            dq = tl.zeros([HELD, SIZE], tl.float32)
            dq = sum_over_keys(
                dq, q, d_out, k_rows, v_rows, k_row, v_row, lse, constant, slope, factor * LOG2E, last,
                0, plain, keys, size, SIZE, PADDED, False, ENTROPY, PRECISION, STEP,
            )  # fmt: skip
            dq = sum_over_keys(
                dq, q, d_out, k_rows, v_rows, k_row, v_row, lse, constant, slope, factor * LOG2E, last,
                plain, end, keys, size, SIZE, PADDED, True, ENTROPY, PRECISION, STEP,
            )  # fmt: skip
            dq *= factor[:, None]
            if TEMPERATURE:
                # s is inversely proportional to t, and sum_j ds_j s_j = q . dq.
                d_temperature = -tl.sum(q.to(tl.float32) * dq, 1) / temperature
                tl.store(d_temperature_ptr + row, d_temperature, mask=inside)
            dq_at = dq_ptr + batch * dq_batch + head * dq_head + rows[:, None] * dq_row + channels[None, :]
            tl.store(dq_at, dq.to(dq_ptr.dtype.element_ty), mask=held)
