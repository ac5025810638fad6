"""Using a trained model: logits and text. Takes a model by interface."""
