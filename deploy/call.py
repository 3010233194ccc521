"""`moefleet call`: one request to a running fleet over gRPC, its text written as it comes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import grpc

from deploy.config_keys import read_api_keys
from deploy.protos import moefleet_v1_pb2 as pb
from deploy.protos import moefleet_v1_pb2_grpc as pb_grpc
from router.errors import ConfigError, MoefleetError


@dataclass(frozen=True, slots=True, kw_only=True)
class CallOptions:
    """What `moefleet call` was asked. Either text or message is given."""

    target: str
    """host:port of the gRPC API."""
    text: str | None = None
    """Continued as it is."""
    message: str | None = None
    """A user's turn, put through the model's chat template."""
    model: str | None = None
    """None: the one that is served."""
    max_tokens: int = 128
    temperature: float | None = None
    """None: what the model's generation_config.json says."""
    seed: int | None = None
    ignore_eos: bool = False
    api_key_file: Path | None = None
    """Its first key is used."""
    tls_ca_file: Path | None = None
    """Authorities that the server's certificate is checked against, PEM; None: no TLS."""
    timeout_s: float = 600.0


class CallError(MoefleetError):
    """The call was refused or broke off: names the gRPC status and the server's reason."""


def run_call(options: CallOptions, out: TextIO) -> None:
    """Send the request and write the text as it comes, with a newline at the end.

    Raises:
        ConfigError: the options cannot work.
        CallError: the server refused, or is not there.
    """
    request = _request(options)
    key = read_api_keys(options.api_key_file)[0].key if options.api_key_file else None
    metadata = () if key is None else (("authorization", f"Bearer {key}"),)
    with _channel(options) as channel, _told(options.target):
        stub = pb_grpc.GenerationStub(channel)
        if not request.model:
            request.model = _served_model(stub, metadata)
        for response in stub.Generate(request, timeout=options.timeout_s, metadata=metadata):
            out.write(response.text)
            out.flush()
        out.write("\n")


def _request(options: CallOptions) -> pb.GenerateRequest:
    if (options.text is None) == (options.message is None):
        raise ConfigError("--text, --message: give one of them")
    sampling = pb.Sampling(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        seed=options.seed,
        ignore_eos=options.ignore_eos,
    )
    request = pb.GenerateRequest(model=options.model or "", sampling=sampling)
    if options.message is not None:
        request.chat.messages.add(role="user", content=options.message)
    else:
        request.text = options.text or ""
    return request


def _served_model(stub: pb_grpc.GenerationStub, metadata: tuple[tuple[str, str], ...]) -> str:
    models = stub.ListModels(pb.ListModelsRequest(), timeout=30, metadata=metadata).models
    if not models:
        raise CallError("no model is served")
    return models[0].name


def _channel(options: CallOptions) -> grpc.Channel:
    # A proxy of the environment is for the internet, not for a fleet.
    settings = [("grpc.enable_http_proxy", 0)]
    if options.tls_ca_file is None:
        return grpc.insecure_channel(options.target, options=settings)
    try:
        authorities = options.tls_ca_file.read_bytes()
    except OSError as error:
        raise ConfigError(f"--tls-ca-file: {options.tls_ca_file} cannot be read ({error.strerror})") from error
    return grpc.secure_channel(options.target, grpc.ssl_channel_credentials(authorities), options=settings)


@contextmanager
def _told(target: str) -> Iterator[None]:
    """Turn a failed call into one line."""
    try:
        yield
    except grpc.RpcError as error:
        # Every error of a call is a Call too, which its type does not say.
        reason = f"{error.code().name}: {error.details()}" if isinstance(error, grpc.Call) else str(error)
        raise CallError(f"{target}: {reason}") from error
