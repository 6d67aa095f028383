"""What things cost: small commands, each `python -m benchmarks.NAME`, that print a table."""
