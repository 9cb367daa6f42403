"""Doors into other libraries' loops and configs; each is imported on its own."""
