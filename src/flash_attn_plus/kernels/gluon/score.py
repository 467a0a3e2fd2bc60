"""What makes scores of the products of queries and keys: scale, softcap and ALiBi; scores are in log2 units."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flash_attn_plus.kernels.gluon.hopper import record

_LOG2E = gl.constexpr(1.4426950408889634)
_RECIPROCAL = gl.constexpr("rcp.approx.ftz.f32 $0, $1;")


@gluon.jit
def _reciprocal(x):
    """1 / x to about one rounding, by one instruction."""
    return gl.inline_asm_elementwise(_RECIPROCAL, "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@record
class Rule:
    """The rule of a call. Without softcap and ALiBi products are left as they are: the scale folds into exponents."""

    scale: object  # softmax_scale * log2(e)
    cap_scale: object  # softmax_scale / softcap
    cap: object  # softcap * log2(e)
    slopes_ptr: object
    slope_stride: object  # between batches
    has_softcap: gl.constexpr

    @gluon.jit
    def factor(self):
        """By what to multiply the results of `apply`."""
        if self.has_softcap or self.slopes_ptr is not None:
            return 1.0
        return self.scale

    @gluon.jit
    def slope(self, batch, head):
        """The slope of a head, in the units of scores."""
        slope = 0.0
        if self.slopes_ptr is not None:
            slope = gl.load(self.slopes_ptr + batch * self.slope_stride + head) * _LOG2E
        return slope

    @gluon.jit
    def apply(self, products, slope, row0, col0, layout: gl.constexpr):
        """(scores, softcap's steepness); rows and columns, keys or queries, count from the same diagonal."""
        scores = products
        steepness = products
        if self.has_softcap:
            tanh = 1.0 - 2.0 * _reciprocal(gl.exp2(products * (self.cap_scale * (2.0 * _LOG2E))) + 1.0)
            scores = tanh * self.cap
            steepness = 1.0 - tanh * tanh
        if self.slopes_ptr is not None:
            if not self.has_softcap:
                scores = products * self.scale
            rows = (gl.arange(0, products.shape[0], gl.SliceLayout(1, layout)) + (row0 - col0)).to(gl.float32)
            cols = gl.arange(0, products.shape[1], gl.SliceLayout(0, layout)).to(gl.float32)
            scores = scores - slope * gl.abs(gl.expand_dims(rows, 1) - gl.expand_dims(cols, 0))
        return scores, steepness
