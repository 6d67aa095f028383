"""Every act: reading blocks, merging them, writing results, and proving that it was done."""
