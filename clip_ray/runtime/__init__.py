"""The only package that imports Ray: data streams, the training job, evaluation."""
