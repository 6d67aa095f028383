"""The executor on Ray: actors that each own shards. The only package that imports Ray, and only when it is used."""

from mergeflow.execute.ray.executor import RayExecutor
from mergeflow.execute.ray.options import EMBEDDED, RayOptions

__all__ = ["EMBEDDED", "RayExecutor", "RayOptions"]
