"""Exact changes of what a denoiser computes. Each is put on an instance and taken off again bit for bit."""
