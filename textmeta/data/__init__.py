"""Text to episodes: corpora, class splits and the episode sampler."""
