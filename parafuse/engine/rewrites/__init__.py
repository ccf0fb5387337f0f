"""Exact changes of what a denoiser computes (docs/rewrites.md): fewer products, fewer tokens, fewer kernels."""
