"""Parts that both models are assembled from: parameters and per-shard mathematics, one idea per file.

Everything here runs inside the one manual region (`layers.region`). Shape letters, used in comments and einsums:

    B  rows of the batch on this device         V  vocabulary, on this device V/tensor
    S  positions of a row                       H  heads, on this device H/tensor
    D  width of the residual stream (embed)     K  width of one head
    F  width of the MLP, on this device F/tensor    T  slots of a key/value cache
    L  layers
"""
