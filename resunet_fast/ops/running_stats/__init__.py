"""Running statistics of batch norm, updated in place."""
