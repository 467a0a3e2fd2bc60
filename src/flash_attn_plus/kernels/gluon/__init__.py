"""Attention kernels for NVIDIA Hopper in Gluon, Triton's lower-level language: warp-specialised, TMA-fed."""
