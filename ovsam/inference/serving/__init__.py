"""Segmenter as the model of labelling tools."""
