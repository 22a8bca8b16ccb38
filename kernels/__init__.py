"""Triton kernels, one file per op, installed as phyxdream.kernels."""
