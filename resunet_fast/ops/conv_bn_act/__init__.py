"""Convolution, batch norm, residual addition and ReLU."""
