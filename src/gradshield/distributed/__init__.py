"""More than one machine: the shards of a scan on a Ray cluster, or among the processes of a launcher."""

from gradshield.distributed.launched import Launched, serve
from gradshield.distributed.ray_data import Ray
from gradshield.launcher import first

__all__ = ["Launched", "Ray", "first", "serve"]
