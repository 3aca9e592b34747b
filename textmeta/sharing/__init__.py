"""What is saved and shared: adapter folders and their cards."""
