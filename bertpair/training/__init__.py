"""The loop, one step of it, the optimizer, the losses."""
