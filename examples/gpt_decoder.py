"""A character-level GPT that learns from Python source and then writes, a token at a time, with a key/value cache.

python examples/gpt_decoder.py
"""

import inspect

import torch
from torch import Tensor, nn

from flash_attention import KeyValueCache, MultiHeadFlashAttention

WIDTH, HEADS, LAYERS, CONTEXT = 96, 3, 2, 64


class Block(nn.Module):
    """Attention and MLP, pre-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = MultiHeadFlashAttention(WIDTH, HEADS, causal=True, rotary_dim=WIDTH // HEADS)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 384), nn.GELU(), nn.Linear(384, WIDTH))

    def forward(self, x: Tensor, cache: KeyValueCache | None) -> Tensor:
        """(batch, seqlen, width) in and out; with a cache, x are the tokens that follow its own."""
        x = x + self.attention(self.norm(x), cache=cache)
        return x + self.mlp(x)


class GPT(nn.Module):
    """Byte values in, logits of the next byte out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 128))

    def forward(self, tokens: Tensor, caches: list | None = None) -> Tensor:
        """(batch, seqlen) -> (batch, seqlen, 128)."""
        x = self.embedding(tokens)
        for block, cache in zip(self.blocks, caches or [None] * LAYERS, strict=True):
            x = block(x, cache)
        return self.head(x)


@torch.inference_mode()
def generate(model: GPT, prompt: Tensor, length: int, cached: bool = True) -> Tensor:
    """The prompt (batch, n) and `length` greedy tokens; without the cache every step reads everything again."""
    caches = [b.attention.make_cache(len(prompt), prompt.shape[1] + length) for b in model.blocks] if cached else None
    tokens = new = prompt
    for _ in range(length):
        new = model(new if cached else tokens, caches)[:, -1:].argmax(-1)
        tokens = torch.cat((tokens, new), dim=1)
    return tokens


def main(steps: int = 200) -> None:
    """Train on a module of the standard library, then continue a prompt."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    text = inspect.getsource(inspect).encode("ascii", "ignore")
    windows = torch.tensor(list(text), device=device).unfold(0, CONTEXT + 1, 1)  # a view of all of them
    model = GPT().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(1, steps + 1):
        window = windows[torch.randint(len(windows), (16,), device=device)]
        loss = nn.functional.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step:>4}: loss {loss.item():.3f} nats a byte")
    print(bytes(generate(model.eval(), windows[text.index(b"def get"), None, :7], 200)[0].tolist()).decode())


if __name__ == "__main__":
    main()
