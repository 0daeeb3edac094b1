"""Nearest and bilinear upsampling with a deterministic backward."""
