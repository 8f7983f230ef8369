"""A model folder → HTTP."""
