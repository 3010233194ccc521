"""The Kubernetes manifests, without a cluster: schemas, our own rules, and agreement with the config beside them."""

import json
import tomllib
from pathlib import Path
from typing import TypeAlias, cast

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator

from deploy.config import parse_config
from deploy.config_check import logical_cpus
from deploy.config_file import load_config_file
from deploy.gateway import LEAVE_S
from deploy.render import render_document
from tests.support.source_tree import ROOT

Values: TypeAlias = dict[str, "Value"]
Value: TypeAlias = str | int | float | bool | list["Value"] | Values | None

KUBERNETES = "1.33"
MANIFEST = ROOT / "k8s" / "rayservice-cpu.yaml"
CONFIG = ROOT / "k8s" / "serve-cpu.yaml"


def load_all(path: Path) -> list[Values]:
    """Every document of a YAML file."""
    return [cast(Values, document) for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))]


def at(values: Value, *keys: str | int) -> Value:
    """The value under these keys, which must be there."""
    for key in keys:
        if isinstance(key, int):
            assert isinstance(values, list)
            values = values[key]
        else:
            assert isinstance(values, dict)
            values = values[key]
    return values


def items(values: Value, *keys: str | int) -> list[Values]:
    """The objects of the list under these keys."""
    found = at(values, *keys)
    assert isinstance(found, list)
    return [each for each in found if isinstance(each, dict)]


def ray_service() -> Values:
    """The manifest's RayService."""
    (found,) = [each for each in load_all(MANIFEST) if each["kind"] == "RayService"]
    return found


def groups() -> dict[str, Values]:
    """Head group and worker groups by name."""
    cluster = at(ray_service(), "spec", "rayClusterConfig")
    workers = {str(group["groupName"]): group for group in items(cluster, "workerGroupSpecs")}
    head = at(cluster, "headGroupSpec")
    assert isinstance(head, dict)
    return {"head": head, **workers}


GROUP_NAMES = tuple(groups())


def pod(name: str) -> Values:
    """A group's pod template as a Pod."""
    template = at(groups()[name], "template")
    assert isinstance(template, dict)
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, **cast(Values, template["metadata"])}} | {
        "spec": template["spec"]
    }


def test_core_objects_are_valid() -> None:
    core = [each for each in load_all(MANIFEST) if each["kind"] != "RayService"]
    assert {str(each["kind"]) for each in core} == {"ServiceAccount", "Service", "NetworkPolicy"}
    for each in core:
        kubernetes_validate.validate(each, KUBERNETES, strict=True)


def test_ray_service_uses_known_fields_as_they_are_meant() -> None:
    schema = json.loads((ROOT / "tests" / "data" / "rayservice.schema.json").read_text(encoding="utf-8"))
    errors = [
        f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(ray_service())
    ]
    assert errors == []


def test_a_number_where_ray_start_wants_text_is_noticed() -> None:
    schema = json.loads((ROOT / "tests" / "data" / "rayservice.schema.json").read_text(encoding="utf-8"))
    damaged = ray_service()
    params = at(damaged, "spec", "rayClusterConfig", "headGroupSpec", "rayStartParams")
    assert isinstance(params, dict)
    params["num-cpus"] = 0
    assert [error.message for error in Draft202012Validator(schema).iter_errors(damaged)] == [
        "0 is not of type 'string'"
    ]


@pytest.mark.parametrize("name", GROUP_NAMES)
def test_pod_templates_are_valid_pods(name: str) -> None:
    kubernetes_validate.validate(pod(name), KUBERNETES, strict=True)


@pytest.mark.parametrize("name", GROUP_NAMES)
def test_pods_pass_the_restricted_standard(name: str) -> None:
    spec = at(pod(name), "spec")
    assert at(spec, "securityContext", "runAsNonRoot") is True
    assert at(spec, "securityContext", "seccompProfile", "type") == "RuntimeDefault"
    assert at(spec, "automountServiceAccountToken") is False
    for container in items(spec, "containers"):
        assert at(container, "securityContext", "allowPrivilegeEscalation") is False
        assert at(container, "securityContext", "capabilities", "drop") == ["ALL"]
        assert at(container, "securityContext", "readOnlyRootFilesystem") is True
    allowed = {"configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret"}
    assert {key for volume in items(spec, "volumes") for key in volume} - {"name"} <= allowed


@pytest.mark.parametrize("name", GROUP_NAMES)
def test_pods_ask_for_what_they_may_use_and_are_probed(name: str) -> None:
    for container in items(pod(name), "spec", "containers"):
        assert at(container, "resources", "requests") == at(container, "resources", "limits")
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)


@pytest.mark.parametrize("name", GROUP_NAMES)
def test_shared_memory_is_in_memory_and_bounded(name: str) -> None:
    (shm,) = [volume for volume in items(pod(name), "spec", "volumes") if volume["name"] == "shm"]
    assert at(shm, "emptyDir", "medium") == "Memory"
    assert at(shm, "emptyDir", "sizeLimit")
    (container,) = items(pod(name), "spec", "containers")
    assert "/dev/shm" in [mount["mountPath"] for mount in items(container, "volumeMounts")]


@pytest.mark.parametrize("name", GROUP_NAMES)
def test_secrets_are_only_referred_to(name: str) -> None:
    for container in items(pod(name), "spec", "containers"):
        names = [str(variable["name"]) for variable in items(container, "env") if "value" in variable]
        assert [each for each in names if "TOKEN" in each or "KEY" in each] == []
    assert at(ray_service(), "spec", "rayClusterConfig", "authOptions") == {
        "mode": "token",
        "secretName": "moefleet-ray-token",
    }


@pytest.mark.parametrize("name", GROUP_NAMES)
def test_pods_outlive_the_drain(name: str) -> None:
    config = parse_config(load_config_file(CONFIG))
    grace = at(pod(name), "spec", "terminationGracePeriodSeconds")
    assert isinstance(grace, int)
    assert grace >= max(pool.drain_s for _, pool in config.pools.roles) + LEAVE_S + 15


def test_worker_replicas_lie_within_their_bounds() -> None:
    for group in items(ray_service(), "spec", "rayClusterConfig", "workerGroupSpecs"):
        fewest, count, most = (group[key] for key in ("minReplicas", "replicas", "maxReplicas"))
        assert isinstance(fewest, int)
        assert isinstance(count, int)
        assert isinstance(most, int)
        assert fewest <= count <= most


def test_the_manifest_carries_what_render_prints_for_the_config_beside_it() -> None:
    assert at(ray_service(), "spec", "serveConfigV2") == render_document(parse_config(load_config_file(CONFIG)))


def test_workers_have_a_cpu_for_each_thread_of_a_rank_and_the_head_none() -> None:
    found = groups()
    assert at(found.pop("head"), "rayStartParams", "num-cpus") == "0"
    given = sum(
        int(cast(str, at(group, "rayStartParams", "num-cpus"))) * cast(int, group["replicas"])
        for group in found.values()
    )
    assert given == logical_cpus(parse_config(load_config_file(CONFIG)), grown=False)


def test_every_pod_holds_a_gateway_for_the_grpc_service() -> None:
    config = parse_config(load_config_file(CONFIG))
    workers = sum(cast(int, group["replicas"]) for name, group in groups().items() if name != "head")
    assert config.gateway.replicas == 1 + workers
    (service,) = [each for each in load_all(MANIFEST) if each["kind"] == "Service"]
    assert [port["port"] for port in items(service, "spec", "ports")] == [config.grpc.port]
    for name in GROUP_NAMES:
        labels = at(pod(name), "metadata", "labels")
        selector = at(service, "spec", "selector")
        assert isinstance(labels, dict)
        assert isinstance(selector, dict)
        # The operator's own label: without it calls are led to a head whose gateway is not up yet, or not any more.
        assert selector.items() <= (labels | {"ray.io/serve": "true"}).items()
        assert "ray.io/serve" in selector


def test_the_operator_finds_the_port_of_its_service() -> None:
    config = parse_config(load_config_file(CONFIG))
    for name in GROUP_NAMES:
        (container,) = items(pod(name), "spec", "containers")
        ports = {port["name"]: port["containerPort"] for port in items(container, "ports")}
        # KubeRay makes no Service where the head's container has no port of this name.
        assert ports["serve"] == config.http.port


def test_http_is_served_by_the_head_too() -> None:
    # Or a rolling update of the only other gateway leaves the operator's Service with none.
    assert at(ray_service(), "spec", "excludeHeadPodFromServeSvc") is False


def test_pods_of_gateways_that_leave_are_found_unready_before_the_port_closes() -> None:
    probes = [
        at(container, "readinessProbe")
        for name in GROUP_NAMES
        for container in items(pod(name), "spec", "containers")
        if "httpGet" in cast(Values, container["readinessProbe"])
    ]
    assert len(probes) == 1
    for probe in probes:
        # Then kube-proxy has to be told.
        assert cast(int, at(probe, "periodSeconds")) * cast(int, at(probe, "failureThreshold")) <= LEAVE_S - 3


def test_versions_agree() -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    )
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert at(ray_service(), "spec", "rayClusterConfig", "rayVersion") == pins["ray"]
    for name in GROUP_NAMES:
        assert [container["image"] for container in items(pod(name), "spec", "containers")] == [f"moefleet:{version}"]


def test_the_image_runs_as_an_ordinary_user_and_pins_what_it_installs() -> None:
    lines = (ROOT / "k8s" / "Dockerfile").read_text(encoding="utf-8").splitlines()
    assert "USER 10001:10001" in lines
    assert "RUN pip install -c constraints.txt ." in lines
    copied = [
        word for line in lines if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]
    ]
    assert [word for word in copied if not (ROOT / word).exists()] == []
