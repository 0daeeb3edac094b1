"""Upsampled features and the skip connection, written into a given buffer, for inference."""
