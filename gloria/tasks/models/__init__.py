"""Models that answer tasks: with a head of ours, or by what they find likely."""
