"""Transformer blocks: residual stream, norms, dropout and stochastic depth around a mixer and an MLP."""

from functools import partial

import torch
from torch import nn

from flash_attn.modules.mha import MHA
from flash_attn.modules.mlp import Mlp
from flash_attn.ops.triton.layer_norm import RMSNorm, layer_norm_fn

__all__ = ["Block", "ParallelBlock", "StochasticDepth"]


class StochasticDepth(nn.Module):
    """In training, drop the whole input of each sample (mode "row") or of the batch (mode "batch").

    What is kept is divided by 1 - p (Huang et al., arXiv 1603.09382).
    """

    def __init__(self, p, mode):
        super().__init__()
        assert 0.0 <= p <= 1.0, f"p must be in [0, 1], not {p}"
        assert mode in ("batch", "row"), f"mode must be 'batch' or 'row', not {mode!r}"
        self.p = p
        self.mode = mode

    def forward(self, input):
        """(b, ...) -> the same shape."""
        if not self.training or self.p == 0.0:
            return input
        samples = input.shape[0] if self.mode == "row" else 1
        keep = input.new_empty(samples, *[1] * (input.ndim - 1)).bernoulli_(1.0 - self.p)
        return input * (keep / (1.0 - self.p) if self.p < 1.0 else keep)

    def extra_repr(self):
        """p and mode, for printing."""
        return f"p={self.p}, mode={self.mode}"


def _check_fusible(norms, dropouts):
    for norm in norms:
        assert isinstance(norm, (nn.LayerNorm, RMSNorm)), (
            f"fused_dropout_add_ln needs nn.LayerNorm or flash_attn's RMSNorm, not {type(norm).__name__}"
        )
        assert getattr(norm, "drop", None) is None, "fused_dropout_add_ln needs a norm without a dropout of its own"
    for dropout in dropouts:
        assert isinstance(dropout, nn.Dropout), f"fused_dropout_add_ln needs nn.Dropout, not {type(dropout).__name__}"


def _mark(norms, sequence_parallel, mark_shared_params):
    for norm in norms:
        for p in norm.parameters():
            if sequence_parallel:  # each rank sees its own tokens only, so gradients need summing
                p._sequence_parallel = True
            if mark_shared_params:
                p._shared_params = True


def add_norm(norm, branch, residual, dropout, drop_path=None, fused=False, residual_in_fp32=False, prenorm=True):
    """norm(residual + drop_path(dropout(branch))), and that sum too with `prenorm`; residual may be None."""
    residual_in_fp32 = residual_in_fp32 and branch.dtype != torch.float64  # which is wider already
    if fused:
        rowscale = None
        if drop_path is not None and drop_path.training and drop_path.p > 0.0:
            rowscale = drop_path(branch.new_ones(branch.shape[:-1]))
        return layer_norm_fn(
            branch,
            norm.weight,
            norm.bias,
            residual=residual,
            eps=norm.eps,
            dropout_p=dropout.p if dropout.training else 0.0,
            rowscale=rowscale,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            zero_centered_weight=getattr(norm, "zero_centered_weight", False),
            is_rms_norm=isinstance(norm, RMSNorm),
        )
    total = dropout(branch)
    if drop_path is not None:
        total = drop_path(total)
    if residual is not None:
        total = total + residual
    out = norm(total.to(norm.weight.dtype))
    return (out, total.float() if residual_in_fp32 else total) if prenorm else out


class Block(nn.Module):
    """A mixer and an MLP with their norms.

    Prenorm blocks are rotated: dropout, add, norm, mixer, dropout, add, norm, MLP. They take and return the last
    branch and the residual it has not yet been added to, so that adding and norm are one operation; the model adds
    the last one in front of its final norm. Postnorm blocks are mixer, dropout, add, norm, MLP, dropout, add, norm.

    Args:
        mixer_cls, mlp_cls, norm_cls: called with `dim`; `mlp_cls=nn.Identity` leaves the MLP and its norm out.
        prenorm: which of the two.
        resid_dropout1, resid_dropout2: of the sums in front of (prenorm) or behind (postnorm) mixer and MLP.
        drop_path1, drop_path2: stochastic depth of the same branches.
        fused_dropout_add_ln: compute each dropout, sum and norm in one pass.
        return_residual: mixer and MLP return their input too (postnorm).
        residual_in_fp32: keep the residual in float32 (prenorm).
        sequence_parallel, mark_shared_params: mark the norms' parameters for the care of utils.distributed.
    """

    def __init__(
        self, dim, mixer_cls=None, mlp_cls=None, norm_cls=nn.LayerNorm, dropout_cls=nn.Dropout, prenorm=True,
        resid_dropout1=0.0, resid_dropout2=0.0, drop_path1=0.0, drop_path2=0.0, fused_dropout_add_ln=False,
        return_residual=False, residual_in_fp32=False, sequence_parallel=False, mark_shared_params=False,
    ):  # fmt: skip
        super().__init__()
        assert prenorm or not residual_in_fp32, "residual_in_fp32 needs prenorm=True"
        assert not (prenorm and return_residual), "return_residual needs prenorm=False"
        self.prenorm = prenorm
        self.fused_dropout_add_ln = fused_dropout_add_ln
        self.return_residual = return_residual
        self.residual_in_fp32 = residual_in_fp32
        mixer_cls = mixer_cls or partial(MHA, num_heads=dim // 64)
        mlp_cls = mlp_cls or partial(Mlp, hidden_features=4 * dim)
        self.mixer = mixer_cls(dim)
        self.dropout1 = dropout_cls(resid_dropout1)
        self.drop_path1 = StochasticDepth(drop_path1, mode="row")
        self.norm1 = norm_cls(dim)
        self.mlp = mlp_cls(dim)
        self.has_mlp = not isinstance(self.mlp, nn.Identity)
        if self.has_mlp:
            self.dropout2 = dropout_cls(resid_dropout2)
            self.drop_path2 = StochasticDepth(drop_path2, mode="row")
            self.norm2 = norm_cls(dim)
        norms = [self.norm1, self.norm2] if self.has_mlp else [self.norm1]
        if fused_dropout_add_ln:
            _check_fusible(norms, [self.dropout1, self.dropout2] if self.has_mlp else [self.dropout1])
        _mark(norms, sequence_parallel, mark_shared_params)

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """The mixer's cache."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def _add_norm(self, number, branch, residual, prenorm):
        dropout, drop_path, norm = (getattr(self, f"{n}{number}") for n in ("dropout", "drop_path", "norm"))
        return add_norm(
            norm, branch, residual, dropout, drop_path, self.fused_dropout_add_ln, self.residual_in_fp32, prenorm
        )

    def forward(self, hidden_states, residual=None, mixer_subset=None, mixer_kwargs=None):
        """One block.

        Args:
            hidden_states: (b, s, dim), or whatever shape the mixer takes.
            residual: the sum so far, or None in the first block (prenorm only).
            mixer_subset: positions that the mixer computes; the others end here (prenorm only).
            mixer_kwargs: for the mixer.

        Returns:
            (hidden_states, residual) with prenorm, else hidden_states.
        """
        mixer_kwargs = dict(mixer_kwargs or {})
        if not self.prenorm:
            assert residual is None, "residual needs prenorm=True"
            assert mixer_subset is None, "mixer_subset needs prenorm=True"
            return self._postnorm(hidden_states, mixer_kwargs)
        hidden_states, residual = self._add_norm(1, hidden_states, residual, True)
        if mixer_subset is not None:
            mixer_kwargs["mixer_subset"] = mixer_subset
            residual = residual[:, mixer_subset]
        hidden_states = self.mixer(hidden_states, **mixer_kwargs)
        if self.has_mlp:
            hidden_states, residual = self._add_norm(2, hidden_states, residual, True)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def _postnorm(self, hidden_states, mixer_kwargs):
        branch = self.mixer(hidden_states, **mixer_kwargs)
        if self.return_residual:
            branch, hidden_states = branch
        hidden_states = self._add_norm(1, branch, hidden_states, False)
        if self.has_mlp:
            branch = self.mlp(hidden_states)
            if self.return_residual:
                branch, hidden_states = branch
            hidden_states = self._add_norm(2, branch, hidden_states, False)
        return hidden_states


def add_parallel_norm(norm1, norm2, branches, residual, dropouts, fused=False, residual_in_fp32=False, prenorm=True):
    """norm1(t), norm2(t) and t = residual + the branches after dropout.

    norm2 None gives norm1(t) twice; branches may end with None, residual may be None. Without `prenorm` t is left out.
    """
    residual_in_fp32 = residual_in_fp32 and branches[0].dtype != torch.float64
    if fused:
        ps = {d.p if d.training else 0.0 for d in dropouts}
        assert len(ps) == 1, f"fused_dropout_add_ln needs equal dropout of both branches, not {sorted(ps)}"
        outputs = layer_norm_fn(
            branches[0],
            norm1.weight,
            norm1.bias,
            residual=residual,
            x1=branches[1],
            weight1=None if norm2 is None else norm2.weight,
            bias1=None if norm2 is None else norm2.bias,
            eps=norm1.eps,
            dropout_p=ps.pop(),
            prenorm=True,
            residual_in_fp32=residual_in_fp32,
            zero_centered_weight=getattr(norm1, "zero_centered_weight", False),
            is_rms_norm=isinstance(norm1, RMSNorm),
        )
        first, second, total = outputs if norm2 is not None else (outputs[0], outputs[0], outputs[1])
    else:
        total = dropouts[0](branches[0])
        if branches[1] is not None:
            total = total + dropouts[1](branches[1])
        if residual is not None:
            total = total + residual
        first = norm1(total.to(norm1.weight.dtype))
        second = first if norm2 is None else norm2(total.to(norm2.weight.dtype))
        total = total.float() if residual_in_fp32 else total
    return (first, second, total) if prenorm else (first, second)


class ParallelBlock(nn.Module):
    """Mixer and MLP side by side on norms of one residual (GPT-J, GPT-NeoX, PaLM).

    Args:
        tied_norm: both read `norm1`; there is no `norm2`.
        The other arguments are those of `Block`.
    """

    def __init__(
        self, dim, mixer_cls=None, mlp_cls=None, norm_cls=nn.LayerNorm, dropout_cls=nn.Dropout, resid_dropout1=0.0,
        resid_dropout2=0.0, tied_norm=False, fused_dropout_add_ln=False, residual_in_fp32=False,
        sequence_parallel=False, mark_shared_params=False,
    ):  # fmt: skip
        super().__init__()
        self.tied_norm = tied_norm
        self.fused_dropout_add_ln = fused_dropout_add_ln
        self.residual_in_fp32 = residual_in_fp32
        mixer_cls = mixer_cls or partial(MHA, num_heads=dim // 64)
        mlp_cls = mlp_cls or partial(Mlp, hidden_features=4 * dim)
        self.mixer = mixer_cls(dim)
        self.dropout1 = dropout_cls(resid_dropout1)
        self.norm1 = norm_cls(dim)
        self.mlp = mlp_cls(dim)
        self.dropout2 = dropout_cls(resid_dropout2)
        if not tied_norm:
            self.norm2 = norm_cls(dim)
        norms = [self.norm1] if tied_norm else [self.norm1, self.norm2]
        if fused_dropout_add_ln:
            _check_fusible(norms, [self.dropout1, self.dropout2])
        _mark(norms, sequence_parallel, mark_shared_params)

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """The mixer's cache."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(self, hidden_states1, hidden_states2=None, residual=None, mixer_kwargs=None):
        """One block.

        Args:
            hidden_states1, hidden_states2: what mixer and MLP of the block before gave; in the first block the
                embeddings and None.
            residual: the sum so far, or None in the first block.
            mixer_kwargs: for the mixer.

        Returns:
            (hidden_states1, hidden_states2, residual).
        """
        # The first block has one branch, which counts for both dropouts of the fused form.
        dropouts = (self.dropout1, self.dropout2 if hidden_states2 is not None else self.dropout1)
        hidden_states1, hidden_states2, residual = add_parallel_norm(
            self.norm1,
            None if self.tied_norm else self.norm2,
            (hidden_states1, hidden_states2),
            residual,
            dropouts,
            self.fused_dropout_add_ln,
            self.residual_in_fp32,
        )
        hidden_states1 = self.mixer(hidden_states1, **(mixer_kwargs or {}))
        return hidden_states1, self.mlp(hidden_states2), residual
