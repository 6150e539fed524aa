"""Shards, manifests, plans and blocks: everything about samples that needs no Ray."""
