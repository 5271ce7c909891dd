"""The names that every documented example may take for granted, and settings of all tests."""

import pytest
import torch

torch.set_num_threads(1)  # small systems: threads cost more than they save


@pytest.fixture(autouse=True)
def _names_of_examples(
    doctest_namespace: dict[str, object], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    doctest_namespace["torch"] = torch
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))  # of decoded pictures
