"""Modules and functions for programs that are written for shards."""
