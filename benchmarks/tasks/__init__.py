"""Data and networks of the method comparison, named in recipes as `benchmarks.tasks.MODULE:NAME`."""
