"""Triton kernel: fused causal or full attention that also sums p log p, hence the entropy of every query.

The online softmax of FlashAttention (arXiv 2307.08691) with one more number a row. In base 2, with
x_j = log2(e) s_j - m for the running maximum m, a row keeps

    l = sum_j 2^x_j          a = sum_j 2^x_j x_j          o = sum_j 2^x_j v_j

A new maximum m' multiplies l and o by 2^(m - m') as usual, and a becomes 2^(m - m') (a + l (m - m')). At the end
H = ln 2 (log2 l - a / l): both terms are at least 0 and m has cancelled, so a saturated row loses no digits.
"""

from __future__ import annotations

import triton
import triton.language as tl

HIDDEN = tl.constexpr(-1.0e30)
"""Base-2 score of a key that a query does not see. Finite, since 2^x x must be 0 and not NaN."""
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def attend(
    total, weight, weighted, maximum, q, k_columns, v_rows, k_step, v_step, factor, last,
    first_key, end_key, keys, size,
    BLOCK_N: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take the keys from ``first_key`` up to ``end_key`` into the row sums; EDGE: some of them may be hidden."""
    columns = tl.arange(0, BLOCK_N)
    channels = tl.arange(0, SIZE)
    for start in range(first_key, end_key, BLOCK_N):
        k_at = k_columns + start * k_step
        v_at = v_rows + start * v_step
        present = start + columns < keys
        if EDGE:
            if PADDED:
                k = tl.load(k_at, mask=(channels < size)[:, None] & present[None, :], other=0.0)
                v = tl.load(v_at, mask=present[:, None] & (channels < size)[None, :], other=0.0)
            else:
                k = tl.load(k_at, mask=present[None, :], other=0.0)
                v = tl.load(v_at, mask=present[:, None], other=0.0)
        elif PADDED:
            k = tl.load(k_at, mask=(channels < size)[:, None], other=0.0)
            v = tl.load(v_at, mask=(channels < size)[None, :], other=0.0)
        else:
            k = tl.load(k_at)
            v = tl.load(v_at)
        scores = tl.dot(q, k, input_precision=PRECISION)
        if EDGE:
            scores = tl.where((start + columns)[None, :] <= last[:, None], scores * factor[:, None], HIDDEN)
            higher = tl.maximum(maximum, tl.max(scores, 1))
            x = scores - higher[:, None]
        else:
            higher = tl.maximum(maximum, tl.max(scores, 1) * factor)
            x = scores * factor[:, None] - higher[:, None]
        p = tl.exp2(x)
        shift = maximum - higher
        shrink = tl.exp2(shift)
        weighted = shrink * (weighted + weight * shift) + tl.sum(p * x, 1)
        weight = shrink * weight + tl.sum(p, 1)
        total = tl.dot(p.to(v.dtype), v, total * shrink[:, None], input_precision=PRECISION)
        maximum = higher
    return total, weight, weighted, maximum


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, entropy_ptr, lse_ptr, temperature_ptr,
    scale,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    heads, queries, keys, size,
    GROUP: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr, TEMPERATURE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head. Grid: (query blocks, batch * heads). scale is in base 2, and not negative.

    lse is stored in base 2. In causal attention the longest rows go first, so that short ones fill the end.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)
    index = tl.program_id(1)
    batch = (index // heads).to(tl.int64)
    head = (index % heads).to(tl.int64)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    channels = tl.arange(0, SIZE)
    inside = rows < queries
    held = inside[:, None] & (channels < size)[None, :] if PADDED else inside[:, None]
    q_at = q_ptr + batch * q_batch + head * q_head + rows[:, None] * q_row + channels[None, :]
    q = tl.load(q_at, mask=held, other=0.0)
    k_columns = k_ptr + batch * k_batch + head // GROUP * k_head + columns[None, :] * k_row + channels[:, None]
    v_rows = v_ptr + batch * v_batch + head // GROUP * v_head + columns[:, None] * v_row + channels[None, :]
    if TEMPERATURE:
        factor = scale / tl.load(temperature_ptr + head * queries + rows, mask=inside, other=1.0)
    else:
        factor = tl.full([BLOCK_M], 1.0, tl.float32) * scale
    if CAUSAL:
        last = tl.minimum(rows + (keys - queries), keys - 1)
        seen_by_all = tl.minimum(block * BLOCK_M + (keys - queries) + 1, keys) // BLOCK_N * BLOCK_N
        seen_by_one = tl.minimum((block + 1) * BLOCK_M + (keys - queries), keys)
    else:
        last = tl.full([BLOCK_M], 0, tl.int32) + (keys - 1)
        seen_by_all = keys // BLOCK_N * BLOCK_N
        seen_by_one = keys
    total = tl.zeros([BLOCK_M, SIZE], tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M], tl.float32)
    maximum = tl.full([BLOCK_M], HIDDEN, tl.float32)
    total, weight, weighted, maximum = attend(
        total, weight, weighted, maximum, q, k_columns, v_rows, k_row, v_row, factor, last,
        0, seen_by_all, keys, size, BLOCK_N, SIZE, PADDED, False, PRECISION,
    )  # fmt: skip
    total, weight, weighted, maximum = attend(
        total, weight, weighted, maximum, q, k_columns, v_rows, k_row, v_row, factor, last,
        seen_by_all, seen_by_one, keys, size, BLOCK_N, SIZE, PADDED, True, PRECISION,
    )  # fmt: skip
    log_weight = tl.log2(weight)
    bound = tl.log2((last + 1).to(tl.float32))
    entropy = tl.minimum(tl.maximum(log_weight - weighted / weight, 0.0), bound) * LN2
    at = index.to(tl.int64) * queries + rows
    tl.store(entropy_ptr + at, entropy, mask=inside)
    tl.store(lse_ptr + at, maximum + log_weight, mask=inside)
    out_at = out_ptr + batch * out_batch + head * out_head + rows[:, None] * out_row + channels[None, :]
    tl.store(out_at, (total / weight[:, None]).to(out_ptr.dtype.element_ty), mask=held)
