"""Batch norm, residual addition, ReLU and 2x2 max-pooling in one operator."""
