"""From text to token states: what chosen layers of a transformer make of each token."""
