"""Starts a fleet on a Ray cluster, waits until it is up, and ends it. Imports Ray: set its environment before."""

import contextlib
import http.client
import io
import logging
import re
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

import psutil
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import ProxyLocation
from ray.serve.schema import ApplicationStatus, ServeStatus

from cluster.directory import ACTOR_NAME, MemberStatus, find_directory
from cluster.local_ray import start_local_ray
from deploy.app import build
from deploy.config import ServeConfig, config_mapping
from deploy.config_check import check_ray_address, logical_cpus
from deploy.render import APP_NAME
from deploy.serve_command import http_address, reachable
from router.errors import MoefleetError

_POLL_S: Final = 0.25
_END_S: Final = 15.0
"""Processes of the local cluster that still run after this are killed."""
_BROKEN_OFF_S: Final = 1.0
"""As `_END_S`, of a cluster that never served: what Ray had begun to start may wait for more to come."""
_FAILED: Final = re.compile(r"^(?:ray\.exceptions\.)?(?:\w+\.)*(\w*(?:Error|Exception)): (.+)$", re.MULTILINE)


class StartError(MoefleetError):
    """The fleet could not start; tells the member's or Ray's reason."""


def start_fleet(config: ServeConfig, *, tell: Callable[[str], None]) -> tuple[MemberStatus, ...]:
    """Start Ray or connect to it, deploy the application, and wait until every member and endpoint is up.

    Args:
        tell: takes a line for a person at each thing that is up.

    Raises:
        StartError: Ray, a member or the gateway could not start.
    """
    try:
        _start_ray(config)
        tell(
            f"Ray is up at {ray.get_runtime_context().gcs_address} "
            f"({len(ray.nodes())} node(s), {ray.cluster_resources().get('CPU', 0):g} logical CPUs)"
        )
        _deploy(config)
        statuses = _wait_members(config, tell)
        _wait_http(config)
    except MoefleetError:
        raise
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise StartError(f"the fleet could not start: {failure_reason(str(error))}") from error
    return statuses


def stop_fleet(config: ServeConfig, *, was_up: bool) -> None:
    """End the fleet. Of a local cluster no process is left; an existing cluster loses our application alone.

    Args:
        was_up: requests may run, and get time to end.
    """
    ours = psutil.Process().children(recursive=True)
    try:
        # Ray prints a line about its own controller at each end of Serve, whatever its log level.
        with contextlib.redirect_stdout(io.StringIO()):
            if ray.is_initialized() and (was_up or config.ray.address != "local"):
                _stop_application(config)
            ray.shutdown()
    except (RuntimeError, RayError, TimeoutError) as error:
        logging.getLogger(__name__).warning("the application did not end in order: %s", error)
    finally:
        # Where the application's end failed; else it does nothing.
        ray.shutdown()
        _wait_ended(ours, _END_S if was_up else _BROKEN_OFF_S)


def failure_reason(text: str) -> str:
    """The one line that tells why, out of Ray's account of an exception in another process."""
    found = _FAILED.findall(text)
    if found:
        kind, reason = found[-1]
        return reason if kind in ("ConfigError", "CheckpointError", "MemberLostError") else f"{kind}: {reason}"
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no reason was given"


def _start_ray(config: ServeConfig) -> None:
    logging.getLogger("ray").setLevel(logging.ERROR)
    options = config.ray
    if options.address == "local":
        start_local_ray(
            num_cpus=options.num_cpus or logical_cpus(config, grown=True),
            namespace=options.namespace,
            object_store_bytes=options.object_store_bytes,
        )
    else:
        check_ray_address(options.address)
        ray.init(address=options.address, namespace=options.namespace, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)


def _deploy(config: ServeConfig) -> None:
    # The gateway listens itself.
    serve.start(proxy_location=ProxyLocation.Disabled)
    # `serve.run` would wait through Serve's many attempts at a member that cannot start.
    target = serve.RunTarget(target=build(config_mapping(config)), name=APP_NAME, route_prefix="/")
    serve.run_many([target], wait_for_applications_running=False)


def _wait_members(config: ServeConfig, tell: Callable[[str], None]) -> tuple[MemberStatus, ...]:
    wanted = Counter({role: pool.members for role, pool in config.pools.roles})
    told: set[str] = set()
    while True:
        status = serve.status()
        _check_started(status)
        statuses = _member_statuses(config)
        for each in statuses:
            if each.info.member_id not in told:
                told.add(each.info.member_id)
                tell(f"member {each.info.member_id} is up ({len(each.ranks)} rank(s))")
        running = status.applications[APP_NAME].status == ApplicationStatus.RUNNING
        if running and Counter(each.info.role for each in statuses) >= wanted:
            return statuses
        time.sleep(_POLL_S)


def _check_started(status: ServeStatus) -> None:
    """Raise StartError as soon as a replica has failed to start."""
    application = status.applications[APP_NAME]
    for name, deployment in application.deployments.items():
        if "failed to start" in deployment.message or "exception" in deployment.message.lower():
            raise StartError(f"{name} could not start: {failure_reason(deployment.message)}")
    if application.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
        raise StartError(f"the application could not start: {failure_reason(application.message)}")


def _member_statuses(config: ServeConfig) -> tuple[MemberStatus, ...]:
    directory = find_directory(config.ray.namespace)
    if directory is None:
        return ()
    return ray.get(directory.statuses.remote(), timeout=30)


def _wait_http(config: ServeConfig) -> None:
    """The gateway answers once every pool has a member."""
    until = time.monotonic() + 30
    addresses = _http_addresses(config)
    while not any(_answers(address) for address in addresses):
        if time.monotonic() > until:
            raise StartError(no_gateway(config, addresses))
        time.sleep(_POLL_S)


def no_gateway(config: ServeConfig, addresses: Sequence[str]) -> str:
    """That nothing answers at these addresses, and what is most likely wrong."""
    told = f"no gateway answers at http://{' or '.join(addresses)}/health"
    if config.ray.address == "local":
        return f"{told}; see Serve's logs"
    where = "the head node" if config.gateway.replicas == 1 else f"{config.gateway.replicas} nodes of the cluster"
    return (
        f"{told}: gateways listen on {where}, and http.host={config.http.host} must be an address of theirs that is "
        "reached from here; use 0.0.0.0 (with http.api_keys_file) or start it on the head node, else see Serve's logs"
    )


def _http_addresses(config: ServeConfig) -> list[str]:
    """Where a gateway may be: it listens on its own node."""
    here = http_address(config)
    if config.ray.address == "local" or here.startswith(f"{config.http.host}:"):
        return [here]
    nodes = [str(node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"]]
    return [here, *(f"{reachable(node)}:{config.http.port}" for node in nodes)]


def _answers(address: str) -> bool:
    # A proxy of the environment is for the internet.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{address}/health", timeout=5):
            return True
    except (OSError, http.client.HTTPException):
        # The latter: another program has the port on that node.
        return False


def _stop_application(config: ServeConfig) -> None:
    if config.ray.address == "local":
        serve.shutdown()
        return
    serve.delete(APP_NAME)
    if find_directory(config.ray.namespace) is not None:
        ray.kill(ray.get_actor(ACTOR_NAME, namespace=config.ray.namespace))


def _wait_ended(processes: list[psutil.Process], timeout_s: float) -> None:
    """Wait for the end of these, and kill them and whatever they have started meanwhile where they take too long."""
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    alive += psutil.Process().children(recursive=True)
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=_END_S)
