"""Serving: the ASGI app, the work behind it, and its Ray Serve deployment."""
