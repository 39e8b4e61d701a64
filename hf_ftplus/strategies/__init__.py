"""The strategies that come with hf_ftplus, one idea per file; each is found by its entry point, as a guest's is."""
