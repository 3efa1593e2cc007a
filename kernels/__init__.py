"""Triton kernels and their launchers, installed as `fastgan.kernels`; no autograd here (that is `fastgan.ops`)."""
