"""Readers of public sets and of a user's own logs."""
