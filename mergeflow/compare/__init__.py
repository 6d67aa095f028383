"""How two checkpoints differ: which tensors, how many elements, by how much, and where."""
