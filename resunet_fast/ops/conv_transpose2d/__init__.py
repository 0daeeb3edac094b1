"""Transposed convolution of kernel 2 and stride 2: twice the size, no overlap."""
