"""Checkpoints studied: one resumable sweep over a series, the studies that run in it, and the report."""
