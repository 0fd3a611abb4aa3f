"""Addresses of object stores in the place of folders are refused by name, and no folder of that name appears."""

from pathlib import Path

import pytest

from cactus_ray import cli

SMOKE = str(Path(__file__).parents[2] / "search_spaces" / "smoke.yaml")
ADDRESSES = ["s3://bucket/runs", "gs://bucket", "abfs://container@account", "hdfs://host/runs", "https://host/runs"]
ARGUMENTS = {
    "--runs": lambda address: ["search", SMOKE, "--runs", address],
    "--storage": lambda address: ["search", SMOKE, "--storage", address],
    "data.root": lambda address: ["search", SMOKE, "--set", "data.name=mnist", "--set", f"data.root={address}"],
    "--root": lambda address: ["verify", "model.onnx", "--data", "mnist", "--root", address],
}


@pytest.mark.parametrize("place", ARGUMENTS)
@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_refused_by_name(
    place: str, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(ARGUMENTS[place](address)) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert place in said
    assert address in said
    assert "folder" in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []
