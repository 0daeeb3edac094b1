"""Measurements on one NVIDIA GPU, in parts: `make gpu PART=check|sanitize|shapes|nets`."""
