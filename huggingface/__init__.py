"""Hugging Face folders: read and written tensor by tensor, and checkpoints made from them and into them, proven."""
