"""Formats of other projects; the only place that knows their names."""
