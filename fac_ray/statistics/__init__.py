"""What the numbers can carry: size, sampling error and chance beside FAC, and the diversity of texts."""
