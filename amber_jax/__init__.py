"""Amber: LLaMA-7B as LLM360 trained it, at any size."""
