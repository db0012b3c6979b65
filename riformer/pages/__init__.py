"""HTML pages and model cards about what was trained and measured."""
