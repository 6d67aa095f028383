"""The only package that knows Hydra: what may be typed, what it means, and what to say when it means nothing."""
