"""The transformer, its shape, and Hugging Face folders of it."""
