"""A byte-level GPT in plain torch, with rotary positions; the attention is handed in."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demo.attention import Attention

VOCABULARY = 256  # bytes


@dataclass(frozen=True)
class Size:
    """The shape of a model."""

    layers: int
    heads: int
    head_dim: int
    seqlen: int

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.heads * self.head_dim


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding (Su et al., arXiv 2104.09864) of x (batch, seqlen, heads, head_dim), in halves."""
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)[:, None, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1)


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to its input."""

    def __init__(self, size: Size, attention: Attention) -> None:
        super().__init__()
        self.heads, self.attention = size.heads, attention
        self.norm1, self.norm2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.norm_q, self.norm_k = nn.RMSNorm(size.head_dim), nn.RMSNorm(size.head_dim)  # bounds the scores
        self.qkv = nn.Linear(size.width, 3 * size.width, bias=False)
        self.out = nn.Linear(size.width, size.width, bias=False)
        self.up = nn.Linear(size.width, 4 * size.width)
        self.down = nn.Linear(4 * size.width, size.width)

    def forward(self, x: Tensor) -> Tensor:
        """x and the result are (batch, seqlen, width)."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = rotate(self.norm_q(q)).to(v.dtype), rotate(self.norm_k(k)).to(v.dtype)
        x = x + self.out(self.attention(q, k, v).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """Bytes (batch, seqlen) in, logits (batch, seqlen, 256) out; input and output embeddings are shared."""

    def __init__(self, size: Size, attention: Attention) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, size.width)
        self.blocks = nn.Sequential(*(Block(size, attention) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        nn.init.normal_(self.embedding.weight, std=0.1)
        for block in self.blocks:
            for projection in (block.out, block.down):  # so that the residual sum keeps its size at any depth
                nn.init.normal_(projection.weight, std=0.02 / (2 * size.layers) ** 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next byte at every position."""
        return F.linear(self.norm(self.blocks(self.embedding(tokens))), self.embedding.weight)


@torch.no_grad()
def generate(model: GPT, prompt: bytes, length: int, seqlen: int, temperature: float, seed: int) -> str:
    """The prompt and `length` sampled bytes; the window slides when it is full."""
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([list(prompt)], device=device)
    for _ in range(length):
        logits = model(tokens[:, -seqlen:])[:, -1].float().cpu()
        choice = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        tokens = torch.cat((tokens, choice.to(device)), dim=1)
    return bytes(tokens[0].tolist()).decode("utf-8", errors="replace")
