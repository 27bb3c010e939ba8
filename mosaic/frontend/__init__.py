"""Dynamo's graph in, a callable out: capture, the checks before a run, explain, the decorator."""
