"""Pairs for super-resolution training: clean images in, degraded ones beside them out."""
