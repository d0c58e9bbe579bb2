"""Cleaning: raw files in, clean documents out, on datatrove (`python -m gloria.refine`)."""
