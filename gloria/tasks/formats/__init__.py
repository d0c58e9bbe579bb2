"""Task files as they are published."""
