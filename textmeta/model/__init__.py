"""Text to features, and tasks to initialisations."""
