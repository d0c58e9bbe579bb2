"""Models that answer tasks: with a head of ours, or by log-likelihood."""
