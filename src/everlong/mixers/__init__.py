"""Memories in the state of one layer. One file a memory; the registry finds them."""
