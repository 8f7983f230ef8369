"""Folders that are whole or not there, on any disk."""
