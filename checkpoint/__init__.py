"""The checkpoint series: what was saved, what it is, and the proof that it is still that."""
