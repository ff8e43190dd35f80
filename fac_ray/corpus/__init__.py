"""Files become samples: text rows come in, SAMPLES and REJECTED rows go out."""
