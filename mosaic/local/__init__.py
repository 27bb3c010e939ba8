"""Local forms: what an op becomes on shards when one string cannot say it (``mosaic/rules.py``)."""
