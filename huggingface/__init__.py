"""Folders in Hugging Face's layout, read and written one tensor at a time; no model is known here."""
