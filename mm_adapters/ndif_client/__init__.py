"""Runs on an NDIF service, with this package there or without."""
