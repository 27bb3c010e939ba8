"""Layers without attention: a state that goes along the axis (``mosaic::recurrence``)."""
