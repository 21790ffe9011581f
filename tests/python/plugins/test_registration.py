"""The entry points for vLLM-Omni and SGLang, which tests/python/programs/other_servers.py runs."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, entry_points

import pytest

from zimage_mxfp8.plugins import registration

SERVERS = {
    "vllm-omni": ("vllm_omni.general_plugins", registration.register_vllm_omni),
    "sglang": ("sglang.multimodal_gen.plugins", registration.register_sglang),
}


@pytest.mark.parametrize("server", SERVERS)
def test_the_installed_package_has_the_entry_point(server: str) -> None:
    group, function = SERVERS[server]
    (found,) = entry_points(group=group)
    assert found.load() is function


# Neither server is installed here: to go on would fail with an ImportError.
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("installed", ["0.5.22", "0.31.0", "0.300.1", None])
def test_other_versions_get_a_sentence(
    server: str,
    installed: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def version(package: str) -> str:
        assert package == server
        if installed is None:
            raise PackageNotFoundError(package)
        return installed

    monkeypatch.setattr(registration, "version", version)
    SERVERS[server][1]()
    (record,) = caplog.records
    assert (installed or "an unknown version") in record.getMessage()
    assert f'pip install "{server}==' in record.getMessage()


@pytest.mark.parametrize(
    ("server", "installed"),
    [("vllm-omni", "0.30"), ("vllm-omni", "0.30.1"), ("sglang", "0.5.23.post1")],
)
def test_the_tested_versions_are_taken(
    server: str, installed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration, "version", lambda _: installed)
    with pytest.raises(ModuleNotFoundError, match=server.replace("-", "_")):
        SERVERS[server][1]()
