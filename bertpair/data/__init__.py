"""A file → rows → token ids → batches."""
