"""Image patches to vectors by one linear layer."""

from einops import rearrange
from torch import _assert, nn
from torch.nn.modules.utils import _pair

from flash_attn.ops.fused_dense import FusedDense


class PatchEmbed(nn.Module):
    """(b, c, H, W) -> (b, patches, embed_dim), or (b, rows, columns, embed_dim) with `flatten=False`.

    `proj` multiplies patches flattened in the order channel, row, column, so a convolution's flattened kernel fits it.
    """

    def __init__(
        self,
        img_size=224,
        patch_size=16,
        in_chans=3,
        embed_dim=768,
        norm_layer=None,
        flatten=True,
        bias=True,
        fused_bias_fc=False,
    ):
        super().__init__()
        self.img_size = _pair(img_size)
        self.patch_size = _pair(patch_size)
        self.grid_size = (self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1])
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.flatten = flatten
        linear_cls = FusedDense if fused_bias_fc and bias else nn.Linear
        self.proj = linear_cls(in_chans * self.patch_size[0] * self.patch_size[1], embed_dim, bias=bias)
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, x):
        """Embed a batch of images of exactly `img_size`."""
        height, width = x.shape[-2:]
        _assert(height == self.img_size[0], f"image height {height} is not the model's {self.img_size[0]}")
        _assert(width == self.img_size[1], f"image width {width} is not the model's {self.img_size[1]}")
        p1, p2 = self.patch_size
        x = self.proj(rearrange(x, "b c (h p1) (w p2) -> b h w (c p1 p2)", p1=p1, p2=p2))
        if self.flatten:
            x = x.flatten(1, 2)
        return self.norm(x)
