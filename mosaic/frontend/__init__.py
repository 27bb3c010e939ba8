"""Dynamo's graph in, a callable out: capture, the checks before a run, what users are told."""
