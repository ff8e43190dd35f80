"""Texts become feature activations: one extractor for the pipeline, the synthesis and the service. Torch, no Ray."""
