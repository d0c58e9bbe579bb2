"""Recipes: sections as dataclasses, TOML and flags, one checker."""
