"""From token states to logits: pure functions over T tasks at once, padded to the largest."""
