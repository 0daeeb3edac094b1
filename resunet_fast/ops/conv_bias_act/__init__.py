"""Convolution, bias, residual addition and ReLU, for inference."""
