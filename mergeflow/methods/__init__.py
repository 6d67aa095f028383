"""Numbers: one file for each way in which one value is made of N."""
