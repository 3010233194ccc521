"""What a gateway reads and decides before and beside its serving."""

from pathlib import Path

import pytest

from cluster.directory import Membership
from cluster.members import MemberInfo
from deploy.gateway import load_api_keys, members_to_serve
from deploy.http_guard import ApiKey
from router.errors import ConfigError
from router.request import MemberId


def write_keys(folder: Path, text: str | bytes) -> str:
    path = folder / "keys"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def make_member(name: str, *, generation: int = 0) -> MemberInfo:
    return MemberInfo(member_id=MemberId(name), role="decode", address="127.0.0.1:1", generation=generation)


def make_membership(*members: MemberInfo, settled: bool) -> Membership:
    return Membership(version=1, members=members, max_model_len={}, settled=settled)


def test_keys_come_with_their_tenant_or_one_of_their_own(tmp_path: Path) -> None:
    file = write_keys(tmp_path, "# who may call\n\nsecret-a team-1\n  secret-b\n")
    assert load_api_keys(file) == (ApiKey(key="secret-a", tenant="team-1"), ApiKey(key="secret-b", tenant="key-4"))


def test_without_a_file_there_are_no_keys() -> None:
    assert load_api_keys(None) == ()


@pytest.mark.parametrize(
    ("text", "reason"),
    [("secret-a b c\n", "line 1 has 3 words"), ("# none\n", "holds no key"), (b"\xff\xfe", "cannot be read")],
)
def test_a_wrong_key_file_is_refused_by_name_and_no_key_is_told(tmp_path: Path, text: str | bytes, reason: str) -> None:
    file = write_keys(tmp_path, text)
    with pytest.raises(ConfigError, match=reason) as caught:
        load_api_keys(file)
    assert f"http.api_keys_file={file}" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_missing_key_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_api_keys(str(tmp_path / "none"))


def test_members_that_a_restarted_directory_has_not_heard_of_yet_are_kept() -> None:
    known = (make_member("a"), make_member("b"))
    told = make_membership(make_member("a", generation=1), settled=False)
    assert members_to_serve(known, told) == (make_member("a", generation=1), make_member("b"))


def test_members_that_a_settled_directory_does_not_list_are_left() -> None:
    told = make_membership(make_member("a"), settled=True)
    assert members_to_serve((make_member("a"), make_member("b")), told) == told.members
