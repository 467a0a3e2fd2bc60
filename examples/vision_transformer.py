"""A vision transformer that learns scikit-learn's handwritten digits: 1,797 real images of 8x8 pixels.

pip install scikit-learn
python examples/vision_transformer.py
"""

import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from flash_attention import MultiHeadFlashAttention

WIDTH, HEADS, LAYERS, PATCH, TOKENS = 64, 4, 2, 2, 16


class Block(nn.Module):
    """Attention and MLP, each normalised before and added after."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = MultiHeadFlashAttention(WIDTH, HEADS)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) in and out."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Images (batch, 8, 8) in, logits (batch, 10) out."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, stride=PATCH)
        self.positions = nn.Parameter(0.1 * torch.randn(TOKENS, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10))

    def forward(self, images: Tensor) -> Tensor:
        """The mean of the tokens decides."""
        tokens = self.patches(images[:, None]).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.blocks(tokens).mean(1))


def main(epochs: int = 15) -> float:
    """Train on four fifths of the images and return the accuracy on the rest."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32, device=device) / 8 - 1
    labels = torch.tensor(digits.target, device=device)
    test, training = torch.randperm(len(images), device=device).split([360, len(images) - 360])
    model, steps = VisionTransformer().to(device), epochs * len(training) // 32
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    started = time.perf_counter()
    for step in range(1, steps + 1):
        batch = training[torch.randint(len(training), (32,), device=device)]
        noise = 0.3 * torch.randn(32, 8, 8, device=device)  # so that single pixels are not learned by heart
        loss = F.cross_entropy(model(images[batch] + noise), labels[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % (steps // 5) == 0:
            with torch.inference_mode():
                accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean().item()
            print(f"step {step:>4}: loss {loss.item():.3f}, test accuracy {accuracy:.1%}")
    print(f"trained in {time.perf_counter() - started:.1f} s on {device}")
    return accuracy


if __name__ == "__main__":
    main()
