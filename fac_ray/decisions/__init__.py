"""Measured corpora become decisions: compare, select and check, and the pages that say what they found."""
