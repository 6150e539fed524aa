"""Evaluation: zero-shot classification and retrieval on data sets in CLIP_benchmark's layout."""
