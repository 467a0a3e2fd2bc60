"""The backward pass of a norm over rows so long that the sums of the weight's and bias's gradients fill the registers.

So the rows stay in shared memory: the next one arrives while the threads go over the present one twice, once for the
two sums that its gradient needs and once for the gradient. The weight stays there too: what is left of the first-level
cache would not hold it, and waiting for it in every step of every row took a fifth of the time.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from flash_attn_plus.kernels.gluon.hopper import copy_each


@gluon.jit
def _plus(a0, b0, a1, b1):
    return a0 + a1, b0 + b1


@gluon.jit
def _fetch_row(ptr, rows, slot, is_row, N: gl.constexpr, L: gl.constexpr):
    cols = gl.arange(0, rows.shape[1], layout=L)
    copy_each(rows.index(slot), ptr + cols, mask=(cols < N) & is_row)


@gluon.jit
def _fetch(
    t_ptr, dy_ptr, dt_ptr, t_stride, dy_stride, dt_stride, t_rows, dy_rows, dt_rows, slot, row, num_rows,
    N: gl.constexpr, L: gl.constexpr,
):  # fmt: skip
    """Let a row, if there is one, begin to arrive."""
    is_row, wide = row < num_rows, row.to(gl.int64)
    _fetch_row(t_ptr + wide * t_stride, t_rows, slot, is_row, N, L)
    _fetch_row(dy_ptr + wide * dy_stride, dy_rows, slot, is_row, N, L)
    if dt_ptr is not None:
        _fetch_row(dt_ptr + wide * dt_stride, dt_rows, slot, is_row, N, L)
    async_copy.commit_group()


@gluon.jit
def _read(rows, slot, chunk: gl.constexpr, CHUNK: gl.constexpr, L: gl.constexpr):
    return rows.index(slot).slice(chunk * CHUNK, CHUNK).load(L).to(gl.float32)


@gluon.jit
def _read_weight(row, chunk: gl.constexpr, IS_ZERO_CENTERED: gl.constexpr, CHUNK: gl.constexpr, L: gl.constexpr):
    weight = _read(row, 0, chunk, CHUNK, L)
    return weight + 1.0 if IS_ZERO_CENTERED else weight


@gluon.jit
def _mean_and_rstd(mean_ptr, rstd_ptr, row, num_rows):
    mean = 0.0
    if mean_ptr is not None:
        mean = gl.load(mean_ptr + row, mask=row < num_rows, other=0.0)
    return mean, gl.load(rstd_ptr + row, mask=row < num_rows, other=0.0)


@gluon.jit(do_not_specialize=["num_rows"])
def norm_long_backward_kernel(
    t_ptr, dy_ptr, dt_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    num_rows, t_stride, dy_stride, dt_stride, dx_stride,
    N: gl.constexpr, IS_ZERO_CENTERED: gl.constexpr, BLOCK_N: gl.constexpr, CHUNK: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Each program walks over its share of the rows and leaves one partial sum of each gradient, as the other does."""
    L: gl.constexpr = gl.BlockedLayout([8], [32], [WARPS], [0])  # 16 bytes a thread
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    CHUNKS: gl.constexpr = (N + CHUNK - 1) // CHUNK
    t_rows = gl.allocate_shared_memory(t_ptr.dtype.element_ty, [2, BLOCK_N], FLAT)
    dy_rows = gl.allocate_shared_memory(dy_ptr.dtype.element_ty, [2, BLOCK_N], FLAT)
    dt_rows = t_rows
    if dt_ptr is not None:
        dt_rows = gl.allocate_shared_memory(dt_ptr.dtype.element_ty, [2, BLOCK_N], FLAT)
    weights = gl.allocate_shared_memory(weight_ptr.dtype.element_ty, [1, BLOCK_N], FLAT)
    _fetch_row(weight_ptr, weights, 0, num_rows > 0, N, L)
    program, step = gl.program_id(0), gl.num_programs(0)
    tensors = (t_ptr, dy_ptr, dt_ptr, t_stride, dy_stride, dt_stride, t_rows, dy_rows, dt_rows)
    _fetch(*tensors, 0, program, num_rows, N, L)
    dweights, dbiases = (), ()
    for _ in gl.static_range(CHUNKS):
        dweights += (gl.zeros([CHUNK], gl.float32, L),)
        dbiases += (gl.zeros([CHUNK], gl.float32, L),)
    mean, rstd = _mean_and_rstd(mean_ptr, rstd_ptr, program, num_rows)
    slot = 0
    for row in range(program, num_rows, step):
        next_mean, next_rstd = _mean_and_rstd(mean_ptr, rstd_ptr, row + step, num_rows)
        _fetch(*tensors, slot ^ 1, row + step, num_rows, N, L)
        async_copy.wait_group(1)
        origin = -mean * rstd  # normed = t * rstd + origin
        products, sums = gl.zeros([CHUNK], gl.float32, L), gl.zeros([CHUNK], gl.float32, L)
        for c in gl.static_range(CHUNKS):
            dnormed = _read(dy_rows, slot, c, CHUNK, L) * _read_weight(weights, c, IS_ZERO_CENTERED, CHUNK, L)
            products += (_read(t_rows, slot, c, CHUNK, L) * rstd + origin) * dnormed
            sums += dnormed
        slope, shift = gl.reduce((products, sums), 0, _plus)
        # dt = (dnormed - normed * slope / N - shift / N) * rstd; RMS norm has no shift
        factor = -slope * rstd * rstd / N
        offset = -mean * factor
        if mean_ptr is not None:
            offset -= shift * rstd / N
        new_dweights, new_dbiases = (), ()
        for c in gl.static_range(CHUNKS):
            cols = c * CHUNK + gl.arange(0, CHUNK, layout=L)
            t, dy = _read(t_rows, slot, c, CHUNK, L), _read(dy_rows, slot, c, CHUNK, L)
            new_dweights += (dweights[c] + dy * (t * rstd + origin),)
            new_dbiases += (dbiases[c] + dy,)
            dnormed = dy * _read_weight(weights, c, IS_ZERO_CENTERED, CHUNK, L)
            dt = dnormed * rstd + (t * factor + offset)
            if dt_ptr is not None:  # the gradient that arrives at t itself
                dt += _read(dt_rows, slot, c, CHUNK, L)
            gl.store(dx_ptr + row.to(gl.int64) * dx_stride + cols, dt.to(dx_ptr.dtype.element_ty), mask=cols < N)
        dweights, dbiases = new_dweights, new_dbiases
        mean, rstd, slot = next_mean, next_rstd, slot ^ 1
    async_copy.wait_group(0)
    for c in gl.static_range(CHUNKS):
        cols = c * CHUNK + gl.arange(0, CHUNK, layout=L)
        gl.store(dweight_ptr + program.to(gl.int64) * N + cols, dweights[c], mask=cols < N)
        if dbias_ptr is not None:
            gl.store(dbias_ptr + program.to(gl.int64) * N + cols, dbiases[c], mask=cols < N)
