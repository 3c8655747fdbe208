"""What to run: the Hydra tree that every command composes its configuration from."""
