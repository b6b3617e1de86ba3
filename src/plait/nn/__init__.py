"""Layers without memory, and the roles of their parameters."""
