"""Cross-entropy per row and as a module."""

from functools import partial

import formulas
import pytest
import torch
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from formulas import assert_follows, normal

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = {
    "plain": {},
    "smoothing": {"smoothing": 0.9},
    "scale": {"scale": 0.7},
    "z_loss": {"lse_square_scale": 1e-2},
    "all": {"smoothing": 0.1, "scale": 1.3, "lse_square_scale": 1e-2},
}


def labels_of(rows, classes, device):
    random = torch.Generator().manual_seed(rows)
    labels = torch.randint(0, classes, (rows,), generator=random)
    labels[rows // 2] = -100
    return labels.to(device)


def run(logits, labels, smoothing=0.0, scale=1.0, inplace=False, **options):
    # A leaf may not be overwritten, so the loss gets a copy.
    logits = logits * 1 if inplace else logits
    return cross_entropy_loss(
        logits, labels, label_smoothing=smoothing, logit_scale=scale, inplace_backward=inplace, **options
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_losses_and_gradients(path, device, dtype, options, inplace):
    tensors = {"logits": normal(5, 333, dtype=dtype, device=device, scale=3), "labels": labels_of(5, 333, device)}
    losses, z_losses = assert_follows(
        partial(run, inplace=inplace, **options), partial(formulas.cross_entropy, **options), tensors
    )
    assert losses.dtype == z_losses.dtype == torch.float32
    assert losses[2] == 0
    assert z_losses[2] == 0


@pytest.mark.parametrize("classes", [1, 16, 1024, 9001])
def test_vocabularies(path, device, classes):
    tensors = {
        "logits": normal(3, classes, dtype=torch.float32, device=device, scale=5),
        "labels": labels_of(3, classes, device),
    }
    assert_follows(partial(run, smoothing=0.1), partial(formulas.cross_entropy, smoothing=0.1), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("left", "right"), [(5, 17), (8, 14), (8, 8), (0, 0), (0, 3)])
def test_rows_that_start_anywhere(path, device, dtype, left, right):
    """Of 61 classes, between columns that must be neither read nor written."""
    tensors = {"logits": normal(9, 61, dtype=dtype, device=device, scale=3), "labels": labels_of(9, 61, device)}

    def actual(logits, labels):
        wide = torch.nn.functional.pad(logits, (left, right), value=1e4)
        return run(wide[:, left : left + 61], labels, smoothing=0.1)

    assert_follows(actual, partial(formulas.cross_entropy, smoothing=0.1), tensors)
    wide = torch.nn.functional.pad(tensors["logits"], (left, right), value=1e4)
    rows = wide[:, left : left + 61].requires_grad_()
    losses, _ = cross_entropy_loss(rows, tensors["labels"], label_smoothing=0.1, inplace_backward=True)
    (gradient,) = torch.autograd.grad(losses.sum(), rows)
    assert gradient.data_ptr() == rows.data_ptr()
    edges = torch.cat((wide[:, :left], wide[:, left + 61 :]), 1)
    assert torch.equal(edges, torch.full_like(edges, 1e4))


def test_label_types_strides_and_an_ignored_class(path, device):
    logits = normal(4, 60, dtype=torch.float32, device=device)
    labels = torch.tensor([1, 7, 3, 7], device=device)
    expected = cross_entropy_loss(logits, labels)[0]
    assert torch.equal(cross_entropy_loss(logits, labels.int())[0], expected)
    wide = torch.full((4, 80), 99.0, device=device)
    wide[:, 5:65] = logits
    torch.testing.assert_close(cross_entropy_loss(wide[:, 5:65], labels)[0], expected)
    torch.testing.assert_close(cross_entropy_loss(logits.t().contiguous().t(), labels)[0], expected)
    ignoring = cross_entropy_loss(logits, labels, ignore_index=7)[0]
    assert torch.equal(ignoring == 0, labels == 7)


def test_huge_and_infinite_logits(path, device):
    logits = torch.tensor([[1e4, -1e4, 0.0], [float("-inf"), 0.0, float("-inf")]], device=device)
    labels = torch.tensor([0, 1], device=device)
    assert torch.equal(cross_entropy_loss(logits, labels)[0], torch.zeros(2, device=device))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_label_outside_has_no_cross_entropy(path, device, smoothing):
    logits = normal(2, 50, dtype=torch.float32, device=device).requires_grad_()
    labels = torch.tensor([50, -3], device=device)
    losses, z_losses = run(logits, labels, smoothing=smoothing, lse_square_scale=1e-2)
    x = logits.detach().double()
    lse = x.logsumexp(-1)
    torch.testing.assert_close(z_losses.double(), 1e-2 * lse.square())
    torch.testing.assert_close(losses.double(), smoothing * (lse - x.mean(-1)) + z_losses.double())
    # The gradient is that of logsumexp and smoothing all the same: other ranks' labels look like these.
    losses.sum().backward()
    expected = x.softmax(-1) * (1 + 2e-2 * lse[:, None]) - smoothing / 50
    torch.testing.assert_close(logits.grad.double(), expected, rtol=1e-5, atol=1e-6)


def test_precomputed_logsumexp(path, device):
    logits = normal(3, 70, dtype=torch.float32, device=device)
    labels = torch.tensor([3, 69, 0], device=device)
    given = logits.logsumexp(-1) + 1.0  # wrong on purpose, so that its use shows
    shifted = cross_entropy_loss(logits, labels, precomputed_lse=given)[0]
    torch.testing.assert_close(shifted, cross_entropy_loss(logits, labels)[0] + 1.0)
    for options in ({"label_smoothing": 0.1}, {"logit_scale": 0.5}):
        ignored = cross_entropy_loss(logits, labels, precomputed_lse=given, **options)[0]
        assert torch.equal(ignored, cross_entropy_loss(logits, labels, **options)[0])


def test_in_place_gradient_lies_in_the_logits(path, device):
    logits = normal(3, 40, dtype=torch.bfloat16, device=device).requires_grad_()
    labels = torch.tensor([3, 39, 0], device=device)
    copy = logits * 1
    (gradient,) = torch.autograd.grad(cross_entropy_loss(copy, labels, inplace_backward=True)[0].sum(), copy)
    (expected,) = torch.autograd.grad(cross_entropy_loss(logits, labels)[0].sum(), logits)
    assert gradient.data_ptr() == copy.data_ptr()
    assert torch.equal(gradient, expected)


def test_zero_rows(path, device):
    logits = torch.empty(0, 40, device=device, requires_grad=True)
    losses, z_losses = cross_entropy_loss(logits, torch.empty(0, dtype=torch.long, device=device))
    assert losses.shape == z_losses.shape == (0,)
    losses.sum().backward()
    assert logits.grad.shape == (0, 40)


def test_what_cannot_be(path, device):
    logits = torch.zeros(3, 40, device=device)
    with pytest.raises(AssertionError, match="labels"):
        cross_entropy_loss(logits, torch.zeros(2, dtype=torch.long, device=device))
    with pytest.raises(AssertionError, match="logit_scale"):
        cross_entropy_loss(logits, torch.zeros(3, dtype=torch.long, device=device), logit_scale=0.0)
    labels = torch.zeros(3, dtype=torch.long, device=device)
    for wrong, word in (
        ((logits[None], labels[:1]), "vocabulary"),
        ((logits.long(), labels), "floating-point"),
        ((logits, labels.float()), "integer"),
        ((logits, labels, logits[:2, 0]), "precomputed_lse"),
    ):
        with pytest.raises(AssertionError, match=word):
            cross_entropy_loss(*wrong)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_module_is_pytorchs(path, device, reduction, smoothing):
    logits = normal(6, 100, dtype=torch.float32, device=device)
    labels = labels_of(6, 100, device)
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = CrossEntropyLoss(reduction=reduction, label_smoothing=smoothing)(a, labels)
    expected = torch.nn.CrossEntropyLoss(reduction=reduction, label_smoothing=smoothing)(b, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


def test_module_returns_the_z_loss(path, device):
    logits, labels = normal(6, 100, dtype=torch.float32, device=device), labels_of(6, 100, device)
    loss, z_loss = CrossEntropyLoss(lse_square_scale=0.1, return_z_loss=True)(logits, labels)
    torch.testing.assert_close(loss, CrossEntropyLoss()(logits, labels) + z_loss)
    expected = 0.1 * logits.logsumexp(-1).square()[labels != -100].mean()
    torch.testing.assert_close(z_loss, expected)


def test_module_with_nothing_to_count_and_unknown_reduction(path, device):
    all_ignored = torch.full((2,), -100, device=device)
    assert CrossEntropyLoss()(torch.zeros(2, 5, device=device), all_ignored).isnan()
    with pytest.raises(NotImplementedError, match="reduction"):
        CrossEntropyLoss(reduction="median")
