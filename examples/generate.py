"""Let the model that `make demo` trained write, on `flash_attn_with_kvcache`: greedy and sampled, eager and CUDA graph.

From the root of the repository: python -m examples.generate
"""

import time

import torch
import torch.nn.functional as F
from flash_attn import flash_attn_with_kvcache
from torch import Tensor

from demo.__main__ import choose_device, make_plan
from demo.model import GPT, Size
from demo.weights import load_or_train


class Writer:
    """A GPT with room for `size.seqlen` tokens; a step reads the token at hand and puts the next in its place."""

    def __init__(self, model: GPT, size: Size, dtype: torch.dtype) -> None:
        self.model, device = model.to(dtype), model.embedding.weight.device
        shape = (2, size.layers, 1, size.seqlen, size.heads, size.head_dim)
        self.k, self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.used = torch.zeros(1, device=device, dtype=torch.int32)
        self.token = torch.zeros(1, 1, device=device, dtype=torch.int64)
        frequency = 10000.0 ** (-torch.arange(0, 1, 2 / size.head_dim, device=device))
        angle = torch.arange(size.seqlen, device=device)[:, None] * frequency
        self.cos, self.sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def read(self, tokens: Tensor, temperature: float) -> None:
        """Add tokens (1, n) to the cache and put the next one into `token`; temperature 0 takes the likeliest."""
        x = self.model.embedding(tokens)
        for block, k_cache, v_cache in zip(self.model.blocks, self.k, self.v, strict=True):
            q, k, v = block.qkv(block.norm1(x)).unflatten(-1, (3, block.heads, -1)).unbind(2)
            q, k, angles = block.norm_q(q), block.norm_k(k), (self.cos, self.sin)
            options = {"cache_seqlens": self.used, "causal": True, "rotary_interleaved": False}
            x = x + block.out(flash_attn_with_kvcache(q, k_cache, v_cache, k, v, *angles, **options).flatten(-2))
            x = x + block.down(F.gelu(block.up(block.norm2(x)), approximate="tanh"))
        logits = F.linear(self.model.norm(x[:, -1]), self.model.embedding.weight).float()
        if temperature > 0:  # the largest of logits plus Gumbel noise is a sample of their softmax
            logits = logits / temperature - torch.empty_like(logits).exponential_().log()
        self.used += tokens.shape[1]
        self.token.copy_(logits.argmax(-1, keepdim=True))

    @torch.inference_mode()
    def write(self, prompt: bytes, length: int, temperature: float, is_graph: bool) -> tuple[bytes, float]:
        """`length` bytes behind the prompt, and bytes a second."""
        self.used.zero_()
        written = torch.empty(length, 1, 1, device=self.token.device, dtype=torch.int64)
        for i, tokens in enumerate((torch.tensor([list(prompt)], device=self.token.device), self.token)):
            self.read(tokens, temperature)  # the prompt, then one step, compile what there is to compile
            written[i] = self.token
        if is_graph:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # records the step without running it
                self.read(self.token, temperature)
        started = time.perf_counter()
        for i in range(2, length):
            graph.replay() if is_graph else self.read(self.token, temperature)
            written[i] = self.token
        text = bytes(written.flatten().tolist())  # waits for the device
        return text, (length - 2) / (time.perf_counter() - started)


def main() -> None:
    """Write by every way there is on this device."""
    plan = make_plan(choose_device())
    is_gpu = plan.device.type == "cuda"
    model, size = load_or_train(plan)
    writer = Writer(model, size, plan.dtype)
    for temperature, is_graph in ((0.0, False), (0.7, False), (0.0, True), (0.7, True))[: 4 if is_gpu else 2]:
        text, speed = writer.write(b"def ", min(200, size.seqlen - 4), temperature, is_graph)
        way = f"{'sampled' if temperature else 'greedy'}, {'CUDA graph' if is_graph else 'eager'}"
        print(f"--- {way}: {speed:,.0f} tokens a second\ndef {text.decode(errors='replace')}")


if __name__ == "__main__":
    main()
