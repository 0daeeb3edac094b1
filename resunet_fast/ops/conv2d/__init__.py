"""Convolution over one source, or over two without keeping their concatenation."""
