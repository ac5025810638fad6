"""Training: a pure step, the loop around it, and what they are configured with. Takes a model by interface."""
