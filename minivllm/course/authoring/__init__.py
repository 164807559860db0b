"""Tools for the authors of notebooks."""
