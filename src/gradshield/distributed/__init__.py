"""More than one machine: the shards of a scan on a Ray cluster."""

from gradshield.distributed.ray_data import Ray

__all__ = ["Ray"]
