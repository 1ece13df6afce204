"""Readable oracles: one torch-only function per op that reads like its formula.

Slow on purpose, differentiable, and exact in float64. Kernels are tested against them.
"""
