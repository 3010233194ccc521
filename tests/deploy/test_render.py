import yaml
from ray.serve.schema import ServeDeploySchema

from deploy.config import parse_config
from deploy.render import render_document


def test_the_document_is_what_ray_serve_deploys() -> None:
    config = parse_config({"model": "/models/m", "http": {"host": "0.0.0.0", "port": 81, "api_keys_file": "/keys"}})

    schema = ServeDeploySchema.model_validate(yaml.safe_load(render_document(config)))

    (application,) = schema.applications
    assert (application.name, application.route_prefix, application.import_path) == (
        "moefleet",
        "/",
        "deploy.app:build",
    )
    # Gateways listen themselves.
    assert schema.proxy_location == "Disabled"


def test_the_document_carries_the_whole_config() -> None:
    config = parse_config({"model": "/models/m", "pools": {"mixed": {"max_members": 3, "kv_memory": "1GiB"}}})

    document = yaml.safe_load(render_document(config))

    assert parse_config(document["applications"][0]["args"]) == config


def test_the_document_names_key_files_and_holds_no_key() -> None:
    config = parse_config({"model": "/models/m", "http": {"api_keys_file": "/run/secrets/keys"}})

    assert "api_keys_file: /run/secrets/keys" in render_document(config)
