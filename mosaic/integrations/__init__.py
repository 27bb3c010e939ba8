"""Mosaic in other libraries' training loops: transformers' Trainer and what is made of it.

Needs transformers and accelerate, and is imported by itself: ``import mosaic.integrations``.
"""

from mosaic.integrations.trainer import prepare

__all__ = ["prepare"]
