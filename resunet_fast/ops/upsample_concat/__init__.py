"""Upsampling into the buffer where the skip connection follows along the channels."""
