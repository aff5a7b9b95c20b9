# SPDX-License-Identifier: Apache-2.0
"""Distances of two attention maps, element by element. See docs/ops/attention_distill.md.

a, b are scores over the temperature, a_lse, b_lse the log-sum-exp of their rows; x, y row sums.
"""

import triton
import triton.language as tl

# Planes of row statistics that a kind's forward pass leaves for its backward pass. Equal to
# kdfast.ops.attention_distill.STATS, as a test asserts: kernels import nothing of what calls them.
PLANES = {"kl": 5, "reverse_kl": 6, "jsd": 6, "mse": 6, "cosine": 7, "logit_mse": 2}
KINDS = tuple(PLANES)
KL, REVERSE_KL, JSD, MSE, COSINE, LOGIT_MSE = (tl.constexpr(i) for i in range(6))


@triton.jit
def _logs(a, b, a_lse, b_lse):
    """Logarithms of both maps, and the maps."""
    log_p, log_r = a - a_lse, b - b_lse
    return log_p, log_r, tl.exp(log_p), tl.exp(log_r)


@triton.jit
def _log_mean(log_p, log_r):
    """log((P + R) / 2)."""
    top = tl.maximum(log_p, log_r)
    return top + tl.log(0.5 + 0.5 * tl.exp(-tl.abs(log_p - log_r)))


@triton.jit
def map_terms(a, b, a_lse, b_lse, KIND: tl.constexpr):
    """Three terms whose sums over a row give its distance and x, y; see ``row_results``."""
    if KIND == LOGIT_MSE:
        one = (a - b) * (a - b)
        two, three = one, one
    else:
        log_p, log_r, p, r = _logs(a, b, a_lse, b_lse)
        one = r * (log_r - log_p)
        two, three = one, one
        if KIND == REVERSE_KL:
            one = p * (log_p - log_r)
        if KIND == JSD:
            log_m = _log_mean(log_p, log_r)
            two = p * (log_p - log_m)
            one = 0.5 * (r * (log_r - log_m) + two)
        if KIND == MSE:
            one, two = (p - r) * (p - r), p * (p - r)
        if KIND == COSINE:
            one, two, three = p * r, p * p, r * r
    return one, two, three


@triton.jit
def row_results(one, two, three, count, KIND: tl.constexpr):
    """Distance, x and y of rows from the sums of ``map_terms``."""
    distance, x, y = one, two, three
    if KIND == REVERSE_KL:
        x = one
    if KIND == LOGIT_MSE:
        distance = one / count
    if KIND == COSINE:
        y = 1.0 / tl.sqrt(two * three)
        distance, x = 1 - one * y, one * y / two
    return distance, x, y


@triton.jit
def map_gradient(a, b, known, a_lse, b_lse, x, y, count, KIND: tl.constexpr, PLAIN: tl.constexpr):
    """Gradient of the rows' distances by a; with PLAIN, ``known`` is the student's map."""
    if KIND == LOGIT_MSE:
        g = 2 * (a - b) / count
    else:
        log_p, log_r, p, r = _logs(a, b, a_lse, b_lse)
        if PLAIN:
            p = known
        g = p - r
        if KIND == REVERSE_KL:
            g = p * (log_p - log_r - x)
        if KIND == JSD:
            g = 0.5 * p * (log_p - _log_mean(log_p, log_r) - x)
        if KIND == MSE:
            g = 2 * p * (g - x)
        if KIND == COSINE:
            g = p * (x * p - y * r)
    return g


@triton.jit
def load_stats(ptr, plane, row, ok, KIND: tl.constexpr):
    """a_lse, b_lse, x and y of rows, from the planes that the kind has."""
    a_lse = tl.zeros(row.shape, tl.float32)
    b_lse, x, y = a_lse, a_lse, a_lse
    if KIND != LOGIT_MSE:
        ptr += row
        step = tl.cast(plane, tl.int64)
        a_lse = tl.load(ptr + step, mask=ok, other=0.0)
        b_lse = tl.load(ptr + 2 * step, mask=ok, other=0.0)
        if KIND != KL:
            x = tl.load(ptr + 3 * step, mask=ok, other=0.0)
        if KIND == COSINE:
            y = tl.load(ptr + 4 * step, mask=ok, other=0.0)
    return a_lse, b_lse, x, y
