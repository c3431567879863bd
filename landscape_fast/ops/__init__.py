"""Differentiable ops, each with a plain PyTorch reference and fused kernels."""
