"""Timing and memory of functions, forward and backward, with torch.utils.benchmark and torch.profiler."""

import torch
import torch.utils.benchmark as benchmark


def _device_type(inputs) -> str:
    return next((x.device.type for x in inputs if isinstance(x, torch.Tensor)), "cuda")


def _first(out):
    return out[0] if isinstance(out, tuple) else out


def _measure(run, repeats, desc, verbose, what):
    if verbose:
        print(desc, what)
    timer = benchmark.Timer(stmt="run()", globals={"run": run}, num_threads=torch.get_num_threads())
    measurement = timer.timeit(repeats)
    if verbose:
        print(measurement)
    return timer, measurement


def _gradient(y, grad):
    if grad is None:
        return torch.randn_like(y)
    if grad.shape != y.shape:
        raise RuntimeError(f"grad has shape {tuple(grad.shape)}, but the output has {tuple(y.shape)}")
    return grad


def _clear_gradients(inputs) -> None:
    for x in inputs:
        if isinstance(x, torch.Tensor):
            x.grad = None


def benchmark_forward(fn, *inputs, repeats=10, desc="", verbose=True, amp=False, amp_dtype=torch.float16, **kwinputs):
    """Time fn(*inputs, **kwinputs).

    Args:
        repeats: calls to average over.
        desc: printed in front when `verbose`.
        amp: run under autocast of the inputs' device to `amp_dtype`.

    Returns:
        (Timer, Measurement) of torch.utils.benchmark.
    """

    def run():
        with torch.autocast(device_type=_device_type(inputs), dtype=amp_dtype, enabled=amp):
            fn(*inputs, **kwinputs)

    return _measure(run, repeats, desc, verbose, "- Forward pass")


def benchmark_backward(
    fn, *inputs, grad=None, repeats=10, desc="", verbose=True, amp=False, amp_dtype=torch.float16, **kwinputs
):
    """Time the backward pass of fn's output, of the first one if it is a tuple; see `benchmark_forward`.

    Raises:
        RuntimeError: grad does not have the output's shape.
    """
    with torch.autocast(device_type=_device_type(inputs), dtype=amp_dtype, enabled=amp):
        y = _first(fn(*inputs, **kwinputs))
    grad = _gradient(y, grad)

    def run():
        _clear_gradients(inputs)  # otherwise adding to them is timed too
        y.backward(grad, retain_graph=True)

    return _measure(run, repeats, desc, verbose, "- Backward pass")


def benchmark_combined(
    fn, *inputs, grad=None, repeats=10, desc="", verbose=True, amp=False, amp_dtype=torch.float16, **kwinputs
):
    """Time forward and backward pass together; see `benchmark_backward`."""
    device_type = _device_type(inputs)
    with torch.autocast(device_type=device_type, dtype=amp_dtype, enabled=amp):
        grad = _gradient(_first(fn(*inputs, **kwinputs)), grad)

    def run():
        _clear_gradients(inputs)
        with torch.autocast(device_type=device_type, dtype=amp_dtype, enabled=amp):
            y = _first(fn(*inputs, **kwinputs))
        y.backward(grad, retain_graph=True)

    return _measure(run, repeats, desc, verbose, "- Forward + Backward pass")


def benchmark_fwd_bwd(
    fn, *inputs, grad=None, repeats=10, desc="", verbose=True, amp=False, amp_dtype=torch.float16, **kwinputs
):
    """The results of `benchmark_forward` and of `benchmark_backward`."""
    options = {"repeats": repeats, "desc": desc, "verbose": verbose, "amp": amp, "amp_dtype": amp_dtype, **kwinputs}
    return benchmark_forward(fn, *inputs, **options), benchmark_backward(fn, *inputs, grad=grad, **options)


def benchmark_all(
    fn, *inputs, grad=None, repeats=10, desc="", verbose=True, amp=False, amp_dtype=torch.float16, **kwinputs
):
    """The results of `benchmark_forward`, `benchmark_backward` and `benchmark_combined`."""
    options = {"repeats": repeats, "desc": desc, "verbose": verbose, "amp": amp, "amp_dtype": amp_dtype, **kwinputs}
    return (
        benchmark_forward(fn, *inputs, **options),
        benchmark_backward(fn, *inputs, grad=grad, **options),
        benchmark_combined(fn, *inputs, grad=grad, **options),
    )


def pytorch_profiler(
    fn,
    *inputs,
    trace_filename=None,
    backward=False,
    amp=False,
    amp_dtype=torch.float16,
    cpu=False,
    verbose=True,
    **kwinputs,
):
    """Profile one call of fn, after 30 to warm up.

    Args:
        trace_filename: where to export a Chrome trace.
        backward: profile the backward pass too.
        cpu: record CPU activity as well; without CUDA it is recorded in any case.
        verbose: print the table of the longest operations.
    """
    device_type = _device_type(inputs)

    def run():
        if backward:
            _clear_gradients(inputs)
        with torch.autocast(device_type=device_type, dtype=amp_dtype, enabled=amp):
            out = _first(fn(*inputs, **kwinputs))
        if backward:
            out.backward(torch.ones_like(out))

    for _ in range(30):
        run()
    has_cuda = torch.cuda.is_available()
    kinds = torch.profiler.ProfilerActivity
    activities = ([kinds.CPU] if cpu or not has_cuda else []) + ([kinds.CUDA] if has_cuda else [])
    with torch.profiler.profile(activities=activities, record_shapes=True, with_stack=True) as profile:
        run()
        if has_cuda:
            torch.cuda.synchronize()
    if verbose:
        longest = "self_device_time_total" if device_type == "cuda" else "self_cpu_time_total"
        print(profile.key_averages().table(sort_by=longest, row_limit=50))
    if trace_filename is not None:
        profile.export_chrome_trace(trace_filename)


def benchmark_memory(fn, *inputs, desc="", verbose=True, **kwinputs):
    """Peak GPU memory during fn(*inputs, **kwinputs), in units of 1000 MiB.

    Raises:
        RuntimeError: there is no CUDA device, whose allocator alone keeps such a count.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("benchmark_memory reads the statistics of CUDA's allocator; it needs a CUDA device")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    fn(*inputs, **kwinputs)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / (2**20 * 1000)
    if verbose:
        print(f"{desc} max memory: {peak}GB")
    torch.cuda.empty_cache()
    return peak
