"""Sequences of different lengths without padding: packed tensors, lists and nested tensors, all with one result.

python examples/variable_length.py
"""

import torch
from flash_attn import flash_attn_varlen_func
from flash_attn.bert_padding import pad_input, unpad_input
from torch import Tensor

from flash_attention import flash_attention

HEADS, HEAD_DIM = 4, 32
LENGTHS = [100, 7, 251, 1]


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two results agree up to rounding."""
    return bool((a - b).norm() <= (0.02 if a.dtype == torch.bfloat16 else 1e-5) * b.norm())


def main() -> None:
    """Attend within each sequence by every route, and compare with one sequence at a time."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    sequences = [torch.randn(3, n, HEADS, HEAD_DIM, device=device, dtype=dtype) for n in LENGTHS]  # q, k and v

    # 1. One at a time: what the others must equal.
    by_heads = [[x.transpose(0, 1) for x in s] for s in sequences]  # (heads, seqlen, head_dim)
    alone = [flash_attention(*(x[None] for x in qkv), causal=True)[0].transpose(0, 1) for qkv in by_heads]
    expected = torch.cat(alone)

    # 2. Packed: all tokens in a row, and where each sequence starts.
    q, k, v = torch.cat(sequences, dim=1)
    starts = torch.tensor([0, *LENGTHS], device=device).cumsum(0, dtype=torch.int32)
    packed = flash_attn_varlen_func(q, k, v, starts, starts, max(LENGTHS), max(LENGTHS), causal=True)
    assert close(packed, expected)
    print(f"packed: {len(q)} tokens computed; a padded batch would have {len(LENGTHS) * max(LENGTHS)}")

    # 3. Padded data with a mask, as tokenizers give it: unpad, attend, pad again.
    padded = torch.nn.utils.rnn.pad_sequence([s.transpose(0, 1) for s in sequences], batch_first=True)
    mask = torch.arange(max(LENGTHS), device=device) < torch.tensor(LENGTHS, device=device)[:, None]
    tokens, where, starts, longest, _ = unpad_input(padded, mask)
    out = flash_attn_varlen_func(*tokens.unbind(1), starts, starts, longest, longest, causal=True)
    assert close(pad_input(out, where, *mask.shape)[mask], expected)
    print(f"padded {tuple(padded.shape)}: unpadded to {len(tokens)} tokens and back")

    # 4. A list of tensors, in and out.
    listed = flash_attention(*(list(part) for part in zip(*by_heads, strict=True)), causal=True)
    assert close(torch.cat([x.transpose(0, 1) for x in listed]), expected)
    print("list:", ", ".join(str(tuple(x.shape)) for x in listed))

    # 5. A nested tensor, with gradients.
    offsets = starts.long()  # one for all three: that tells that their lengths are equal
    q, k, v = (torch.nested.nested_tensor_from_jagged(x, offsets).requires_grad_() for x in (q, k, v))
    nested = flash_attention(*(x.transpose(1, 2) for x in (q, k, v)), causal=True).transpose(1, 2)
    assert close(nested.values(), expected)
    nested.values().sum().backward()
    print(f"nested: values {tuple(nested.values().shape)}, gradient of q {tuple(q.grad.values().shape)}")


if __name__ == "__main__":
    main()
