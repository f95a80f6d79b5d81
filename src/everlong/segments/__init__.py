"""Memories carried from segment to segment around a whole stack. One file a memory."""
