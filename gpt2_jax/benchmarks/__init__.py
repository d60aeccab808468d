"""Measurements of speed: each compares within one run, since machines differ and vary."""
