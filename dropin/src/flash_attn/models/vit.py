"""Vision transformer (Dosovitskiy et al., arXiv 2010.11929) whose last block computes the class token only."""

import re
from functools import partial

import torch
from torch import nn

from flash_attn.layers.patch_embed import PatchEmbed
from flash_attn.modules.block import Block, StochasticDepth, add_norm
from flash_attn.modules.mha import MHA
from flash_attn.modules.mlp import FusedMLP, Mlp

__all__ = [
    "VisionTransformer",
    "create_block",
    "create_mixer_cls",
    "create_mlp_cls",
    "init_weights_vit_timm",
    "vit_base_patch16_224",
]


def create_mixer_cls(num_heads, qkv_bias, attn_drop, use_flash_attn, fused_bias_fc, cross_attn=False):
    """A callable dim -> MHA."""
    return partial(
        MHA,
        num_heads=num_heads,
        cross_attn=cross_attn,
        qkv_proj_bias=qkv_bias,
        dropout=attn_drop,
        fused_bias_fc=fused_bias_fc,
        use_flash_attn=use_flash_attn,
    )


def create_mlp_cls(embed_dim, mlp_ratio, act_layer, fused_mlp):
    """A callable dim -> MLP with int(embed_dim * mlp_ratio) hidden features."""
    hidden = int(embed_dim * mlp_ratio)
    if fused_mlp:
        assert act_layer is nn.GELU, "fused_mlp needs act_layer=nn.GELU, which it computes by the tanh approximation"
        return partial(FusedMLP, hidden_features=hidden)
    return partial(Mlp, hidden_features=hidden, activation=act_layer())


def create_block(
    embed_dim, num_heads, mlp_ratio, qkv_bias, drop_rate, attn_drop_rate, drop_path1, drop_path2, norm_layer,
    act_layer, use_flash_attn, fused_bias_fc, fused_mlp, fused_dropout_add_ln, layer_idx=None, n_layer=None,
    last_layer_subset=False,
):  # fmt: skip
    """One prenorm Block with a float32 residual; with `last_layer_subset` the last one is cross-attention."""
    is_last = last_layer_subset and layer_idx == n_layer - 1
    return Block(
        embed_dim,
        create_mixer_cls(num_heads, qkv_bias, attn_drop_rate, use_flash_attn, fused_bias_fc, cross_attn=is_last),
        create_mlp_cls(embed_dim, mlp_ratio, act_layer, fused_mlp),
        norm_cls=norm_layer,
        prenorm=True,
        resid_dropout1=drop_rate,
        resid_dropout2=drop_rate,
        drop_path1=drop_path1,
        drop_path2=drop_path2,
        fused_dropout_add_ln=fused_dropout_add_ln,
        residual_in_fp32=True,
    )


def init_weights_vit_timm(module, name=""):
    """Truncated normal weights and zero biases of a linear layer; other modules with `init_weights` do their own."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif hasattr(module, "init_weights"):
        module.init_weights()


class VisionTransformer(nn.Module):
    """Images to class logits.

    Args:
        num_classes: 0 leaves the head out.
        mlp_ratio: hidden features of the MLP by embed_dim.
        no_embed_class: the class token gets no position embedding.
        drop_rate, attn_drop_rate, drop_path_rate: dropout of sums, of attention weights, and stochastic depth of the
            last block (it grows linearly from 0).
        embed_layer, norm_layer, act_layer: default PatchEmbed, LayerNorm with eps 1e-6, GELU.
        use_flash_attn, fused_bias_fc, fused_mlp, fused_dropout_add_ln: which implementations to use.

    global_pool, init_values, class_token, pre_norm, fc_norm and weight_init exist for timm's signature and must have
    their defaults.
    """

    def __init__(
        self, img_size=224, patch_size=16, in_chans=3, num_classes=1000, global_pool="token", embed_dim=768,
        depth=12, num_heads=12, mlp_ratio=4.0, qkv_bias=True, init_values=None, class_token=True,
        no_embed_class=False, pre_norm=False, fc_norm=None, drop_rate=0.0, attn_drop_rate=0.0, drop_path_rate=0.0,
        weight_init="", embed_layer=PatchEmbed, norm_layer=None, act_layer=None, use_flash_attn=False,
        fused_bias_fc=False, fused_mlp=False, fused_dropout_add_ln=False,
    ):  # fmt: skip
        super().__init__()
        assert global_pool == "token", f"global_pool must be 'token', not {global_pool!r}"
        assert class_token, "class_token must be True"
        assert init_values is None, "init_values is not supported: there is no layer scale"
        assert not pre_norm, "pre_norm must be False: every block begins with a norm"
        assert not fc_norm, "fc_norm must be None: the class token is normalised already"
        assert weight_init == "", f"weight_init must be '', not {weight_init!r}"
        norm_layer = norm_layer or partial(nn.LayerNorm, eps=1e-6)
        act_layer = act_layer or nn.GELU
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.num_features = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1
        self.no_embed_class = no_embed_class
        kwargs = {"fused_bias_fc": True} if fused_bias_fc else {}
        self.patch_embed = embed_layer(
            img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, **kwargs
        )
        length = self.patch_embed.num_patches + (0 if no_embed_class else 1)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.randn(1, length, embed_dim) * 0.02)
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        block = partial(
            create_block, embed_dim, num_heads, mlp_ratio, qkv_bias, drop_rate, attn_drop_rate, norm_layer=norm_layer,
            act_layer=act_layer, use_flash_attn=use_flash_attn, fused_bias_fc=fused_bias_fc, fused_mlp=fused_mlp,
            fused_dropout_add_ln=fused_dropout_add_ln, n_layer=depth, last_layer_subset=True,
        )  # fmt: skip
        # A block begins with the dropout of the one before it.
        self.blocks = nn.ModuleList(
            [block(drop_path1=rates[i - 1] if i > 0 else 0.0, drop_path2=rates[i], layer_idx=i) for i in range(depth)]
        )
        self.dropout = nn.Dropout(drop_rate)
        self.drop_path = StochasticDepth(rates[-1], mode="row")
        self.norm = norm_layer(embed_dim)
        self.fused_dropout_add_ln = fused_dropout_add_ln
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.init_weights(weight_init)

    def init_weights(self, mode=""):
        """timm's initialisation; mode must be ''."""
        assert mode == "", f"mode must be '', not {mode!r}"
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        for name, module in self.named_modules():
            if module is not self:
                init_weights_vit_timm(module, name)

    @torch.jit.ignore
    def no_weight_decay(self):
        """Names of parameters that weight decay should leave alone."""
        return {"pos_embed", "cls_token"}

    def _pos_embed(self, x):
        """(b, patches, e) -> (b, 1 + patches, e), with the class token in front."""
        tokens = self.cls_token.expand(x.shape[0], -1, -1)
        if self.no_embed_class:
            return torch.cat((tokens, x + self.pos_embed), dim=1)
        return torch.cat((tokens, x), dim=1) + self.pos_embed

    def forward_features(self, x, all_tokens=True):
        """Images -> (b, 1 + patches, e), or with all_tokens False the class token alone, (b, 1, e)."""
        hidden_states, residual = self._pos_embed(self.patch_embed(x)), None
        for block in self.blocks[:-1]:
            hidden_states, residual = block(hidden_states, residual)
        subset = None if all_tokens else slice(0, 1)
        hidden_states, residual = self.blocks[-1](hidden_states, residual, mixer_subset=subset)
        return add_norm(
            self.norm,
            hidden_states,
            residual,
            self.dropout,
            self.drop_path,
            fused=self.fused_dropout_add_ln,
            residual_in_fp32=True,
            prenorm=False,
        )

    def forward_head(self, x, pre_logits=False):
        """(b, tokens, e) -> logits (b, classes), or with `pre_logits` the class token (b, e)."""
        x = x[:, 0]
        return x if pre_logits else self.head(x)

    def forward(self, x):
        """Images (b, c, H, W) -> logits (b, classes)."""
        return self.forward_head(self.forward_features(x, all_tokens=False))

    def load_state_dict(self, state_dict, strict=True, **kwargs):
        """As nn.Module's; also accepts timm's names and convolution weights."""
        renamed = {}
        for name, x in state_dict.items():
            name = re.sub(r"^(blocks\.\d+)\.attn\.qkv\.", r"\1.mixer.Wqkv.", name)
            name = re.sub(r"^(blocks\.\d+)\.attn\.proj\.", r"\1.mixer.out_proj.", name)
            is_convolution = name == "patch_embed.proj.weight" and x.dim() == 4
            renamed[name] = x.flatten(1) if is_convolution else x
        prefix = f"blocks.{len(self.blocks) - 1}.mixer."
        for kind in ("weight", "bias"):  # the last block asks with the class token alone
            if prefix + "Wqkv." + kind in renamed:
                x = renamed.pop(prefix + "Wqkv." + kind)
                q, kv = x[: self.embed_dim], x[self.embed_dim :]
                renamed[prefix + "Wq." + kind], renamed[prefix + "Wkv." + kind] = q, kv
        return super().load_state_dict(renamed, strict=strict, **kwargs)


def vit_base_patch16_224(pretrained=False, **kwargs):
    """ViT-B/16 for images of 224 x 224."""
    assert not pretrained, "pretrained weights are not fetched; load them by load_state_dict"
    return VisionTransformer(**{"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12} | kwargs)
