"""Bytes to layout and back, without I/O."""
