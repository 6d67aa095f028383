"""Every decision. Headers in, a `Plan` out: no weight is read, no file is touched, nothing is imported that could."""
