"""For all tests: what makes the suite faster, and changes nothing that a test sees."""

import concurrent.futures
import gc
import subprocess

import pytest
import torch


def pytest_configure(config):
    # The tensors are small, and the other cores have the processes that run ahead.
    torch.set_num_threads(1)
    config.addinivalue_line(
        "markers", "ahead: with_args(prepare) begins a process with the session; fixture `ahead` waits for its end"
    )


@pytest.fixture(scope="session", autouse=True)
def frozen():
    """What the imports made stays until the end: no garbage collection during the tests has to look at it again."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def begun(request, tmp_path_factory):
    """What becomes of the long processes that the chosen tests wait for, by `prepare`, which takes a folder of its own.

    They run one at a time, on a core that the tests leave idle; under xdist, which leaves none, each when it is waited
    for. `prepare` returns command and environment, or None
    where there is nothing to run. It is called here, and not when a process begins, at which time a test may have
    changed whatever it likes.
    """
    found = {}
    pool = concurrent.futures.ThreadPoolExecutor(1)
    # A worker of xdist does not know which of the tests will be its own.
    chosen = [] if hasattr(request.config, "workerinput") else request.session.items
    for marker in (item.get_closest_marker("ahead") for item in chosen):
        if marker and marker.args[0] not in found:
            folder = tmp_path_factory.mktemp("ahead")
            prepared = marker.args[0](folder)
            found[marker.args[0]] = prepared and pool.submit(_run, *prepared, folder)
    yield found
    pool.shutdown(cancel_futures=True)


def _run(command, environment, folder):
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)


@pytest.fixture
def ahead(request, begun, tmp_path_factory):
    """The ended process of a test that is marked so."""
    prepare = request.node.get_closest_marker("ahead").args[0]
    if prepare not in begun:
        folder = tmp_path_factory.mktemp("ahead")
        return _run(*prepare(folder), folder)
    return begun[prepare].result()
