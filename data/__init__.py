"""From documents to batches: tokenise, pack, chunk, and read at any step.

Nothing here depends on how many processes, workers or restarts there were: every order is arithmetic (`packing`).
"""
