"""Reads attentions that are written as products: ``softmax(q @ k.T * scale + mask) @ v``."""
