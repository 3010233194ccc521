"""A Ray cluster of this process's own, on this machine alone."""

import logging

import ray


def start_local_ray(*, num_cpus: int, namespace: str | None = None, object_store_bytes: int | None = None) -> None:
    """Start one; `ray.shutdown` ends it.

    Args:
        num_cpus: logical ones, for placement.
        namespace: of named actors.
        object_store_bytes: shared memory for Ray's objects, of which a fleet makes few; Ray's choice without.
    """
    ray.init(
        address="local",
        num_cpus=num_cpus,
        object_store_memory=object_store_bytes,
        include_dashboard=False,
        namespace=namespace,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _system_config={
            # Ray runs workers at niceness 15, behind all else on the machine: made for tasks in the background.
            "worker_niceness": 0,
            # Ray's own, which nobody reads here; each process counts and sends them.
            "enable_metrics_collection": False,
        },
    )
