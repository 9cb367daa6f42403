"""What several benchmarks share: records, subjects, timing in turn, rivals."""
