"""What is done to q k^T before the softmax, in log2 units, and its derivative."""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _tanh(x, IS_EXACT: tl.constexpr):
    e = tl.exp2(-2.0 * LOG2E * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    y = tl.where(x < 0, -y, y)
    if IS_EXACT:  # 1 - e cancels near zero: five terms of the series hold there to float32 accuracy
        z = x * x
        series = x * (1.0 + z * (-1.0 / 3 + z * (2.0 / 15 + z * (-17.0 / 315 + z * (62.0 / 2835)))))
        y = tl.where(z < 0.04, series, y)
    return y


@triton.jit
def modify(qk, rows, cols, band, rule, F: tl.constexpr):
    """(scores, capped): scores such that softmax weights are 2 ** (scores * multiplier(...)).

    Without softcap and ALiBi these are the products themselves, so that the scale folds into the exponent's
    fused multiply-add. `capped` is tanh(score / softcap), which the derivative needs.
    """
    capped = qk
    if F.has_softcap:
        capped = _tanh(qk * (rule.scale / rule.softcap), F.is_exact)
        qk = capped * (rule.softcap * LOG2E)
    elif F.has_alibi:
        qk = qk * (rule.scale * LOG2E)
    if F.has_alibi:
        distance = tl.abs(rows + (band.len_k - band.len_q) - cols).to(tl.float32)
        qk = qk - (rule.slope * LOG2E) * distance
    return qk, capped


@triton.jit
def multiplier(rule, F: tl.constexpr):
    """The factor that turns what `modify` returns into log2 units."""
    if F.has_softcap or F.has_alibi:
        return 1.0
    return rule.scale * LOG2E


@triton.jit
def derivative(ds, capped, F: tl.constexpr):
    """Gradient of the scaled product from the gradient of the score."""
    if F.has_softcap:
        ds = ds * (1.0 - capped * capped)
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
