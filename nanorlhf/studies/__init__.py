"""studies: experiments on the embedded world over several seeds, each run by `python -m nanorlhf.studies.NAME`."""
