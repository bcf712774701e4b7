"""Torch hooks on an untouched model: what both engines read and edit with."""
