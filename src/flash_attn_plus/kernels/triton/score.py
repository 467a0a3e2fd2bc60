"""What is done to q k^T before the softmax, and its derivative.

Scores are in log2 units, so that weights are powers of two; for float32 inputs in natural units, since the two
roundings of the conversion would show there.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def unit(F: tl.constexpr):
    """The factor from natural units to those of the scores."""
    if F.is_exact:
        return 1.0
    return LOG2E


@triton.jit
def power(x, F: tl.constexpr):
    """exp of x, which is in the scores' units."""
    if F.is_exact:
        return _exact_exp(x)
    return tl.exp2(x)


@triton.jit
def _exact_exp(x):
    """exp x to about one rounding, where the hardware's exponential has four: 2 ** n times a series in the rest."""
    bounded = tl.minimum(tl.maximum(x, -104.0), 89.0)  # beyond: 0 and infinity
    n = tl.floor(bounded * LOG2E + 0.5)
    rest = (bounded - n * 0.693359375) + n * 2.12194440e-4  # ln 2 in two parts; the first product is exact
    series = 1.0 / 720 + rest * (1.0 / 5040)
    series = 0.5 + rest * (1.0 / 6 + rest * (1.0 / 24 + rest * (1.0 / 120 + rest * series)))
    y = (1.0 + (rest + rest * rest * series)) * tl.exp2(n)
    return tl.where(x == x, y, x)


@triton.jit
def _tanh(x, IS_EXACT: tl.constexpr):
    """(tanh x, its derivative 1 - tanh^2 x, without the cancellation of that formula)."""
    e = tl.exp2(-2.0 * LOG2E * tl.abs(x))
    r = 1.0 / (1.0 + e)
    y = (1.0 - e) * r
    y = tl.where(x < 0, -y, y)
    if IS_EXACT:  # 1 - e cancels near zero: five terms of the series hold there to float32 accuracy
        z = x * x
        series = x * (1.0 + z * (-1.0 / 3 + z * (2.0 / 15 + z * (-17.0 / 315 + z * (62.0 / 2835)))))
        y = tl.where(z < 0.04, series, y)
    return y, 4.0 * e * r * r


@triton.jit
def modify(qk, rows, cols, band, rule, F: tl.constexpr):
    """(scores, steepness): scores such that softmax weights are power(scores * multiplier(...)).

    Without softcap and ALiBi these are the products themselves, so that the scale folds into the exponent's
    fused multiply-add. `steepness` is the softcap's derivative.
    """
    steepness = qk
    if F.has_softcap:
        capped, steepness = _tanh(qk * (rule.scale / rule.softcap), F.is_exact)
        qk = capped * (rule.softcap * unit(F))
    elif F.has_alibi:
        qk = qk * (rule.scale * unit(F))
    if F.has_alibi:
        distance = tl.abs(rows + (band.len_k - band.len_q) - cols).to(tl.float32)
        qk = qk - (rule.slope * unit(F)) * distance
    return qk, steepness


@triton.jit
def multiplier(rule, F: tl.constexpr):
    """The factor that turns what `modify` returns into the scores' units."""
    if F.has_softcap or F.has_alibi:
        return 1.0
    return rule.scale * unit(F)


@triton.jit
def derivative(ds, steepness, F: tl.constexpr):
    """Gradient of the scaled product from the gradient of the score."""
    if F.has_softcap:
        ds = ds * steepness
    return ds


@triton.jit
def signed(q, rule, F: tl.constexpr):
    """q with the sign of the scale, so that maxima may be taken before a positive scale is applied."""
    if F.has_signed_scale:
        q = (q * rule.sign).to(q.dtype)
    return q


@triton.jit
def slope_of(slopes_ptr, batch, head, stride_slopes, F: tl.constexpr):
    """The head's ALiBi slope, 0 without ALiBi."""
    slope = 0.0
    if F.has_alibi:
        slope = tl.load(slopes_ptr + batch.to(tl.int64) * stride_slopes + head)
    return slope


@triton.jit
def add_product(a, b, total, F: tl.constexpr):
    """total + a b. In float32 each tile's product is summed by itself first: short chains of roundings."""
    if F.is_exact:
        return total - tl.dot(-a, b, input_precision=F.precision)  # the compiler would fold a sum into the product
    return tl.dot(a, b, total, input_precision=F.precision)
