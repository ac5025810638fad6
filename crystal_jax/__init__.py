"""CrystalCoder: the muP decoder with LayerNorm, biases and partial rotary that LLM360 trained, at any size."""
