"""Labelling of many images: sources of images, the journal, the job on one machine, on Ray, and the choice of images to
correct."""
