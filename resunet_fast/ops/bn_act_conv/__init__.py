"""Batch norm, ReLU and convolution: pre-activation units, and recomputation."""
