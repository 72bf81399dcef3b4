"""Every option of the group ``launcher`` is what ``Launcher`` says."""

from __future__ import annotations

import inspect
import pickle

import pytest
from conftest import option

from runner.config.bind import config_dir
from runner.launch.launcher import Launcher

OPTIONS = sorted(path.stem for path in (config_dir() / "launcher").glob("*.yaml"))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_launcher_has_the_functions_of_the_protocol_and_can_be_pickled(name: str) -> None:
    launcher = option("launcher", name)()
    assert pickle.loads(pickle.dumps(launcher)) == launcher
    assert isinstance(launcher.processes, int)
    assert isinstance(launcher.is_detached, bool)
    for function in ("check", "plan", "launch", "serve"):
        ours, wanted = (inspect.signature(getattr(each, function)) for each in (type(launcher), Launcher))
        assert list(ours.parameters) == list(wanted.parameters), function
        assert [each.default for each in ours.parameters.values()] == [
            each.default for each in wanted.parameters.values()
        ]
