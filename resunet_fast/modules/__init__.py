"""The networks' blocks: plain, in torch.nn, and fused, with the same children."""
