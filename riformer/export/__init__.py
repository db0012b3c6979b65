"""Models in other engines."""
