"""Measured latencies of sub-networks, kept: a record each, in lines of a file that grows."""
