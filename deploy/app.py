"""The Ray Serve application: a gateway and a deployment for each pool. The only place with a `.bind`."""

from typing import Final

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from cluster.member import PoolMember, PoolMemberConfig
from deploy.config import PoolConfig, ServeConfig, engine_config, parse_config
from deploy.gateway import LEAVE_S, RunningGateway, start_gateway
from deploy.scaling_policy import POLICY_PATH, load_numbers
from router.request import Role

POOL_NAMES: Final[dict[Role, str]] = {"prefill": "PrefillPool", "decode": "DecodePool", "mixed": "MixedPool"}
_STOP_MARGIN_S: Final = 15.0
_STOP_WAIT_S: Final = 0.5
_HEAD: Final = "node:__internal_head__"
"""Ray's own resource of the head node."""
_HEALTH_PERIOD_S: Final = 2.0
_UNBOUNDED: Final = 100_000
"""Requests in flight are bounded by our own admission, which knows what they cost."""


class PoolReplica:
    """A Serve replica that holds one member. Requests never come through Serve's handles, only its care does."""

    async def __init__(self, role: Role, args: dict[str, object]) -> None:
        self._member = PoolMember(member_config(parse_config(args), role))
        await self._member.start()

    async def check_health(self) -> None:
        """Asked by Serve; raising has this replica replaced."""
        self._member.check_health()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Asked by Serve; what the pool's policy decides on."""
        return load_numbers(self._member.load)

    async def __call__(self) -> str:
        """The member's id: a handle call has no other use here."""
        return self._member.member_id

    async def __del__(self) -> None:
        await self._member.stop()


def member_config(config: ServeConfig, role: Role) -> PoolMemberConfig:
    """What the members of one pool are told."""
    pool = dict(config.pools.roles)[role]
    return PoolMemberConfig(
        role=role,
        engine=engine_config(config, role),
        namespace=config.ray.namespace,
        interface="loopback" if config.ray.address == "local" else "node",
        drain_s=pool.drain_s,
    )


def build(args: dict[str, object]) -> Application:
    """Make the application; the builder that Serve config documents name as `deploy.app:build`.

    Args:
        args: a ServeConfig as plain data (`deploy.config.config_mapping`).

    Raises:
        ConfigError: a key or value is wrong.
    """
    config = parse_config(args)
    pools = [_pool(role, pool).bind(role, args) for role, pool in config.pools.roles]
    gateway = serve.deployment(
        name="Gateway",
        num_replicas=config.gateway.replicas,
        max_ongoing_requests=_UNBOUNDED,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=_HEALTH_PERIOD_S,
        graceful_shutdown_wait_loop_s=_STOP_WAIT_S,
        graceful_shutdown_timeout_s=max(pool.drain_s for _, pool in config.pools.roles) + LEAVE_S + _STOP_MARGIN_S,
    )(GatewayReplica)
    if config.gateway.replicas > 1:
        # Each gateway listens on the ports of its node.
        gateway = gateway.options(max_replicas_per_node=1)
    elif config.ray.address != "local":
        # Where clients look for it.
        gateway = gateway.options(ray_actor_options={"num_cpus": 0, "resources": {_HEAD: 0.001}})
    return gateway.bind(args, *pools)


class GatewayReplica:
    """A Serve replica that holds a gateway, which listens on ports of its own: Serve's proxies took as much time for a
    request as everything else at the gateway, and requests waited there in no order of ours. Pools are named here so
    that Serve deploys them.
    """

    async def __init__(self, args: dict[str, object], *pools: object) -> None:
        self._gateway: RunningGateway = await start_gateway(parse_config(args))
        self._pools = pools

    async def check_health(self) -> None:
        """Asked by Serve; raising has this replica replaced."""
        self._gateway.check_health()

    async def __call__(self) -> str:
        """Nothing: no request comes through Serve."""
        return ""

    async def __del__(self) -> None:
        await self._gateway.stop()


def _pool(role: Role, pool: PoolConfig) -> serve.Deployment:
    most = pool.max_members or pool.members
    scaling = None
    if most > pool.members:
        policy = AutoscalingPolicy(
            policy_function=POLICY_PATH,
            policy_kwargs={
                "min_members": pool.members,
                "max_members": most,
                "down_delay_s": pool.downscale_delay_s,
            },
        )
        # Growing waits in Serve, shrinking in the policy.
        scaling = AutoscalingConfig(
            min_replicas=pool.members,
            max_replicas=most,
            upscale_delay_s=pool.upscale_delay_s,
            downscale_delay_s=0.0,
            look_back_period_s=2.0,
            policy=policy,
        )
    return serve.deployment(
        name=POOL_NAMES[role],
        num_replicas=None if scaling is not None else pool.members,
        autoscaling_config=scaling,
        max_ongoing_requests=_UNBOUNDED,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=_HEALTH_PERIOD_S,
        graceful_shutdown_wait_loop_s=_STOP_WAIT_S,
        graceful_shutdown_timeout_s=pool.drain_s + _STOP_MARGIN_S,
    )(PoolReplica)
