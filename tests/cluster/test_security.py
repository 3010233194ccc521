"""The cluster token on sockets and in metadata."""

import socket
import struct
import threading

import pytest

from cluster.security import (
    check_token,
    client_hello,
    new_token,
    server_hello,
)
from router.errors import ConfigError, CorruptDataError


def shake(client_token: str, server_token: str) -> list[str]:
    """Run both sides over a socket pair; returns the errors of the sides that failed."""
    errors: list[str] = []
    client, server = socket.socketpair()

    def serve() -> None:
        with server:
            try:
                server_hello(server, server_token, timeout_s=2)
            except CorruptDataError as error:
                errors.append(f"server: {error}")

    thread = threading.Thread(target=serve)
    thread.start()
    with client:
        try:
            client_hello(client, client_token, timeout_s=2)
        except CorruptDataError as error:
            errors.append(f"client: {error}")
        thread.join(5)
    return errors


def test_two_sides_with_the_same_token_accept_each_other() -> None:
    token = new_token()
    assert shake(token, token) == []


def test_a_wrong_token_is_refused_on_both_sides() -> None:
    errors = shake(new_token(), new_token())
    assert sorted(error.split(":")[0] for error in errors) == ["client", "server"]
    assert all("token" in error for error in errors)


def test_a_silent_peer_ends_the_hello_within_its_timeout() -> None:
    client, server = socket.socketpair()
    with client, server, pytest.raises(CorruptDataError, match="stalled"):
        client_hello(client, new_token(), timeout_s=0.05)


def test_a_peer_of_another_protocol_is_named() -> None:
    client, server = socket.socketpair()
    with client, server:
        server.sendall(b"HTTP/1.1 400 Bad Request\r\n" + b" " * 64)
        with pytest.raises(CorruptDataError, match="does not speak this protocol"):
            client_hello(client, new_token(), timeout_s=1)


def test_a_listener_that_cannot_prove_the_token_is_refused() -> None:
    client, server = socket.socketpair()
    with client, server:
        server.sendall(b"MOEFLEET1" + bytes(32) + bytes(32))
        with pytest.raises(CorruptDataError, match="another cluster token"):
            client_hello(client, new_token(), timeout_s=1)


def test_hello_restores_the_socket_timeout() -> None:
    client, server = socket.socketpair()
    client.settimeout(7)
    with client, server:
        server.close()
        with pytest.raises(CorruptDataError):
            client_hello(client, new_token(), timeout_s=1)
        assert client.gettimeout() == 7


@pytest.mark.parametrize("token", ["", "short", "has a space in the middle", "\u00fcnicode" * 4])
def test_a_token_that_cannot_serve_is_refused(token: str) -> None:
    with pytest.raises(ConfigError, match="cluster token"):
        check_token(token)


def test_a_new_token_serves() -> None:
    assert check_token(new_token())


def test_a_peer_that_has_cut_the_connection_is_reported_though_it_has_no_address_any_more() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
        # Closing with unsent data dropped resets the connection.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        with server, pytest.raises(CorruptDataError, match="the peer closed or stalled"):
            server_hello(server, new_token(), timeout_s=1)
