"""Samples become activations: the extractor as a pool of Ray actors, resumable; what kills a process is set aside."""
