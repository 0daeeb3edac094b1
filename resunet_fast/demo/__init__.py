"""The demo: both models trained side by side on digits composited onto photographs."""

from resunet_fast.demo.command import main

__all__ = ["main"]
