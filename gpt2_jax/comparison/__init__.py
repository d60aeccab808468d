"""A base model against the same with adapters, side by side."""
