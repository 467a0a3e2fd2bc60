"""Portable Triton kernels and the small device functions they share."""
