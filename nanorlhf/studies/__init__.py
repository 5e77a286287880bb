"""Experiments over several seeds, each run by `python -m nanorlhf.studies.NAME`."""
