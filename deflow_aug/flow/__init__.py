"""The conditional normalizing flow and its invertible layers."""
