"""A model folder → labels, metrics, tables, pictures."""
