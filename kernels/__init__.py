"""Triton kernels, one file per op (the scans of an RSSM share theirs), installed as phyxdream.kernels."""
