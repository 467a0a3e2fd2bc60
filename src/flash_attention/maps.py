"""Pictures of attention for debugging: exact softmax rows, collected from modules by name, drawn as heat maps."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flash_attention.functional import check_tensors, is_positional, window_bounds
from flash_attention.modules import FlashAttention
from flash_attention.padding import aligned_queries, check_mask
from flash_attention.ragged import Sequences, is_ragged, sequences_of
from flash_attn_plus import InvalidArgument

Selection = int | slice | Sequence[int] | None
_BLOCK_NUMBERS = 2**24  # scores of a block of rows: 64 MiB of float32


def _chosen(name: str, selection: Selection, count: int) -> list[int]:
    """The selected ones of range(count), counted from the end where negative."""
    if selection is None:
        selection = slice(None)
    if isinstance(selection, slice):
        return list(range(count)[selection])
    wanted = [selection] if isinstance(selection, int) else list(selection)
    if not all(-count <= i < count for i in wanted):
        raise InvalidArgument(f"{name} must select from the {count} there are, but is {selection!r}")
    return [i % count for i in wanted]


def _map_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


class _Visibility:
    """Which keys each query sees, and how far away they are, where padding does not count."""

    def __init__(self, q: Tensor, k: Tensor, keep: Tensor | None, options: dict[str, Any]) -> None:
        seqlen_q, seqlen_k, device = q.shape[2], k.shape[2], q.device
        self.slopes = options["alibi_slopes"]
        self.left, right = window_bounds(options["window_size"])
        self.right = 0 if options["causal"] else right
        self.keep = keep
        query_keep = None
        if keep is not None and is_positional(seqlen_q, options["causal"], (self.left, right), self.slopes):
            query_keep = aligned_queries(keep, seqlen_q)
            self.column = (keep.cumsum(1) - 1)[:, None, :]
            query = query_keep.cumsum(1) - 1 + (keep.sum(1) - query_keep.sum(1))[:, None]
        else:
            self.column = torch.arange(seqlen_k, device=device)[None, None, :]
            query = torch.arange(seqlen_k - seqlen_q, seqlen_k, device=device)[None, :]
            if seqlen_q == 1 and self.right == 0:
                self.right = -1
        self.query, self.query_keep = query, query_keep

    def apply(self, scores: Tensor, rows: Tensor, heads: list[int]) -> Tensor:
        """Biased scores (b, h, r, sk), -inf where query rows[r] does not see the key."""
        distance = (self.column - self.query[:, rows, None])[:, None]  # (1 or b, 1, r, sk)
        if self.slopes is not None:
            slopes = self.slopes[..., heads].to(scores.dtype)
            scores = scores - slopes[..., None, None] * distance.abs()
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if self.left >= 0:
            hidden = hidden | (distance < -self.left)
        if self.right >= 0:
            hidden = hidden | (distance > self.right)
        if self.keep is not None:
            hidden = hidden | ~self.keep[:, None, None, :]
        if self.query_keep is not None:
            hidden = hidden | ~self.query_keep[:, None, rows, None]
        return scores.masked_fill(hidden, float("-inf"))


def attention_rows(
    q: Tensor,
    k: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    rows: Selection = None,
    heads: Selection = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    block_rows: int | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """The rows of `attention_map` slice after slice, for statistics of maps that are too large to hold.

    Args:
        block_rows: rows of a slice; default as many as take 64 MiB.
        The other arguments are those of `attention_map`.

    Yields:
        The numbers of r queries, and their weights (b, heads, r, sk).
    """
    check_tensors(q, k, k)
    if key_padding_mask is not None:
        check_mask(key_padding_mask, (k.shape[0], k.shape[2]), k.device)
    wanted_rows, wanted_heads = _chosen("rows", rows, q.shape[2]), _chosen("heads", heads, q.shape[1])
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    options = {"causal": causal, "window_size": window_size, "alibi_slopes": alibi_slopes}
    visibility = _Visibility(q, k, key_padding_mask, options)
    group = q.shape[1] // k.shape[1]
    if block_rows is None:
        block_rows = max(1, _BLOCK_NUMBERS // max(1, q.shape[0] * len(wanted_heads) * k.shape[2]))
    dtype = _map_dtype(q)
    with torch.autocast(q.device.type, enabled=False):
        keys = k[:, [head // group for head in wanted_heads]].to(dtype).transpose(-1, -2)
        for start in range(0, len(wanted_rows), block_rows):
            numbers = wanted_rows[start : start + block_rows]
            index = torch.tensor(numbers, device=q.device)
            scores = q[:, wanted_heads][:, :, index].to(dtype) @ keys * scale
            if softcap > 0.0:
                scores = softcap * torch.tanh(scores / softcap)
            weights = visibility.apply(scores, index, wanted_heads).softmax(-1)
            yield numbers, weights.nan_to_num(0.0)  # a row that sees no key


def attention_map(
    q: Tensor | Sequences,
    k: Tensor | Sequences,
    key_padding_mask: Tensor | None = None,
    *,
    rows: Selection = None,
    heads: Selection = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> Any:
    """The attention weights of some queries, exactly those that `flash_attention` multiplies v with, before dropout.

    Beside the result only a slice of at most 64 MiB of scores is held, so pictures of a few rows of a long sequence
    are cheap. Gradients flow as through any PyTorch code.

    Args:
        q: (b, h, sq, d), or sequences of different lengths as in `flash_attention`.
        k: (b, hk, sk, d), or sequences like q's.
        rows: which queries: a number, a slice, or numbers; negative ones count from the end. Default all, which is a
            result quadratic in the length.
        heads: which query heads, likewise.
        The other arguments are those of `flash_attention`.

    Returns:
        float32 (float64 for float64 inputs) (b, heads, rows, sk); a row that sees no key is 0. For sequences a list of
        (heads, rows, sk_i).

    Raises:
        InvalidArgument: a shape disagrees, or rows or heads select what is not there.
    """
    options: dict[str, Any] = {
        "rows": rows, "heads": heads, "causal": causal, "softmax_scale": softmax_scale, "window_size": window_size,
        "softcap": softcap,
    }  # fmt: skip
    if is_ragged(q):
        if key_padding_mask is not None:
            raise InvalidArgument("key_padding_mask is for dense tensors; lists and nested tensors hold no padding")
        queries, keys = sequences_of(q, 1), sequences_of(k, 1) if is_ragged(k) else []
        if len(keys) != len(queries):
            raise InvalidArgument(f"k must hold {len(queries)} sequences like q, as a list or a nested tensor")
        pairs = list(zip(queries, keys, strict=True))
        slopes = [alibi_slopes] * len(pairs) if alibi_slopes is None or alibi_slopes.ndim == 1 else alibi_slopes
        return [
            attention_map(q_n[None], k_n[None], alibi_slopes=s, **options)[0]
            for (q_n, k_n), s in zip(pairs, slopes, strict=True)
        ]
    slices = [w for _, w in attention_rows(q, k, key_padding_mask, alibi_slopes=alibi_slopes, **options)]
    if not slices:
        return q.new_zeros((q.shape[0], len(_chosen("heads", heads, q.shape[1])), 0, k.shape[2]), dtype=_map_dtype(q))
    return slices[0] if len(slices) == 1 else torch.cat(slices, 2)


@contextmanager
def collect_attention_maps(
    model: nn.Module, rows: Selection = None, heads: Selection = None
) -> Iterator[dict[str, list[Any]]]:
    """Within the block, every call of a `FlashAttention` in the model adds its `attention_map` to a dictionary.

    Args:
        model: a module that is, or holds, `FlashAttention` modules, as `MultiHeadFlashAttention` does.
        rows, heads: what to keep of each map; see `attention_map`.

    Yields:
        The maps by the name of the module that made them, in the order of its calls, detached and on the CPU. Calls
        with a cache do not pass through the module and are not pictured.

    Raises:
        InvalidArgument: the model holds no `FlashAttention`.
    """
    maps: dict[str, list[Any]] = {}

    @torch.no_grad()
    def picture(name: str, module: FlashAttention, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        named = dict(zip(("q", "k", "v", "key_padding_mask", "return_lse"), args, strict=False)) | kwargs
        found = attention_map(
            named["q"], named["k"], named.get("key_padding_mask"), rows=rows, heads=heads, **module.score_options()
        )
        maps.setdefault(name, []).append([x.cpu() for x in found] if isinstance(found, list) else found.cpu())

    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, FlashAttention)]
    if not modules:
        raise InvalidArgument("model holds no FlashAttention module; only those can be pictured")
    handles = [m.register_forward_hook(partial(picture, name), with_kwargs=True) for name, m in modules]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def plot_attention_map(weights: Tensor, labels: Sequence[str] | None = None, columns: int = 4) -> Any:
    """Heat maps of attention weights, one for each head.

    Args:
        weights: (heads, rows, sk) or (rows, sk), of one sequence.
        labels: a title for each heat map; default the head's number.
        columns: heat maps side by side.

    Returns:
        A `matplotlib.figure.Figure`; it has `savefig`, and a notebook shows it.

    Raises:
        InvalidArgument: another number of dimensions, or of labels.
        ImportError: matplotlib is not installed.
    """
    weights = weights[None] if weights.ndim == 2 else weights
    if weights.ndim != 3:
        raise InvalidArgument(f"weights must have shape (heads, rows, sk) of one sequence, not {tuple(weights.shape)}")
    labels = [f"head {n}" for n in range(len(weights))] if labels is None else labels
    if len(labels) != len(weights):
        raise InvalidArgument(f"labels must name each of the {len(weights)} heads, not {len(labels)}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_attention_map needs matplotlib; pip install flash-attention-plus[plot]") from error
    across = max(1, min(columns, len(weights)))
    down = -(-len(weights) // across)
    figure = Figure(figsize=(3.2 * across, 3.2 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for ax in axes[len(weights) :]:
        ax.remove()
    for ax, head, label in zip(axes, weights.detach().float().cpu(), labels, strict=False):
        image = ax.imshow(head.tolist(), aspect="auto", vmin=0.0, interpolation="nearest")
        ax.set(title=label, xlabel="key", ylabel="query")
        figure.colorbar(image, ax=ax)
    return figure
