"""Labelling of many images: sources of images, the journal, jobs on one machine or on Ray, and the selection of images
for correction."""
