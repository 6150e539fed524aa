"""CLIP-Ray: train, evaluate and serve CLIP models on a Ray cluster.

Importing this package costs neither torch nor Ray: it holds the version only.
"""

__version__ = "0.1.0"
