"""The learning: inner loop, algorithms, outer loop, evaluation."""
