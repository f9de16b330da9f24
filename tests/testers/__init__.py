"""Base classes of tests: one for SAM sides, CLIP sides, training stages and readers of data.

A subclass names what is tested and inherits every test, as with the ModelTesterMixin of transformers.
"""
