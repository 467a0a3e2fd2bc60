"""Whoever listens to operators hears of every call; nobody else pays for it."""

import pytest
import torch
from torch._C._profiler import _ExperimentalConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attn_plus import attention, attention_with_kvcache, ops


class Listener(TorchDispatchMode):
    """Keeps the names of the operators that pass."""

    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.heard.append(str(func))
        return func(*args, **(kwargs or {}))


def inputs(**options):
    return [torch.randn(1, 8, 2, 16, **options) for _ in range(3)]


@pytest.fixture
def forbidden(monkeypatch):
    """The operators may not be reached."""

    def refuse(*_):
        raise AssertionError("went through the dispatcher")

    monkeypatch.setattr(ops, "_forward_operator", refuse)
    monkeypatch.setattr(ops, "_backward_operator", refuse)


@pytest.mark.usefixtures("forbidden")
def test_a_plain_call_goes_straight():
    q, k, v = inputs(requires_grad=True)
    attention(q, k, v, causal=True).sum().backward()
    with torch.inference_mode():
        attention(q.detach(), k.detach(), v.detach())


def test_a_mode_hears_of_forward_and_backward():
    q, k, v = inputs(requires_grad=True)
    with Listener() as listener:
        attention(q, k, v, causal=True).sum().backward()
    assert "flash_attn_plus.forward.default" in listener.heard
    assert "flash_attn_plus.backward.default" in listener.heard


@pytest.mark.parametrize("sees_all_threads", [False, True])
def test_a_profiler_hears_of_it(sees_all_threads):
    options = _ExperimentalConfig(profile_all_threads=sees_all_threads)
    with torch.profiler.profile(experimental_config=options) as profile:
        attention(*inputs())
    assert "flash_attn_plus::forward" in {event.name for event in profile.events()}


def test_fake_tensors_and_subclasses_are_served_by_the_operator():
    with FakeTensorMode():
        assert attention(*inputs()).shape == (1, 8, 2, 16)
    q, k, v = (torch.nn.Parameter(x) for x in inputs())
    assert attention(q, k, v).requires_grad


def test_a_tracer_records_the_operator():
    q, k, v = inputs()
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda q, k, v: attention(q, k, v))(q, k, v)
    assert "flash_attn_plus.forward.default" in {str(node.target) for node in traced.graph.nodes}
    assert torch.equal(traced(q, k, v), attention(q, k, v))


def test_tensors_that_need_gradients_go_through_the_operator():
    """It has no formula of its own, of which PyTorch tells in the backward pass."""
    q, k, v = inputs(requires_grad=True)
    out, _ = ops.forward(q, k, v, None, None, 0, 0, None, None, None, None, None, 0.0, 0.25, -1, -1, 0.0)
    with pytest.warns(UserWarning, match="flash_attn_plus::forward: an autograd kernel was not registered"):
        out.sum().backward()


def test_a_cache_call_is_heard_of_too():
    q, *cache = torch.randn(1, 1, 2, 16), *torch.randn(2, 1, 8, 2, 16).unbind()
    with Listener() as listener:
        out = attention_with_kvcache(q, *cache, cache_seqlens=5)
    assert "flash_attn_plus.attend_cache.default" in listener.heard
    assert torch.equal(out, attention_with_kvcache(q, *cache, cache_seqlens=5))
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in (q, *cache)]
        assert attention_with_kvcache(*fake, cache_seqlens=5).shape == q.shape


def test_a_cache_call_gives_no_gradients():
    q, cache = torch.randn(1, 1, 2, 16, requires_grad=True), torch.randn(2, 1, 8, 2, 16)
    assert not attention_with_kvcache(q, *cache, cache_seqlens=5).requires_grad
