"""Models over HTTP: requests of many clients computed in common batches, within stated limits; and one page."""
