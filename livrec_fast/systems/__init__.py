"""Whole systems over the ops, end to end on real data."""
