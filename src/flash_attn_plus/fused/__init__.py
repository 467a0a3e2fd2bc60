"""Fused operations beside attention: norms, rotary embedding, cross-entropy, activations, dense layers.

Each is complete in plain PyTorch and runs its Triton kernels on GPU tensors; `path.uses_triton` decides.
"""
