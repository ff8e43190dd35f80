"""Feature Activation Coverage on Ray: what a text data set covers, what it misses, and samples that fill the gaps.

Read `pipeline.py` first: it is the whole way from text to report on one page. The stages it calls are

    corpus -> activations -> reduction -> relevance -> gaps -> synthesis -> training -> evaluation -> report

and they meet only in the rows of `schema.py` and the files of `artifacts.py`.
"""

__version__ = "0.1.0"
