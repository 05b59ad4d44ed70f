"""Where the jobs of these tests run: on this host, and again on two.

A test that takes `place` starts its jobs by it, and so runs twice. The hosts are network namespaces (`namespaces.py`):
half of the ranks are in each, and nothing is shared but files. Those runs are marked `hosts`; `make test` leaves them
to `make test-hosts` and `make test-all`, but for what test_hosts.py picks.
"""

import subprocess

import pytest

from treadle.distributed.comm import mpi_available

from .launched import Place
from .namespaces import Hosts, unavailable


@pytest.fixture(scope="session")
def hosts(tmp_path_factory):
    """Two hosts; skips the test where there can be none."""
    missing = mpi_available() or unavailable()
    if missing:
        pytest.skip(f"no hosts: {missing}")
    found = Hosts(tmp_path_factory.mktemp("hosts"))
    try:
        found.make()
    except (OSError, subprocess.SubprocessError) as error:
        found.remove()
        pytest.skip(f"this machine does not allow network namespaces: {getattr(error, 'stderr', '') or error}")
    yield found
    found.remove()


@pytest.fixture(scope="session", params=["one host", pytest.param("two hosts", marks=[pytest.mark.hosts,
                                                                                      pytest.mark.slow])])
def place(request):
    """What starts jobs, on one host or on two."""
    return request.getfixturevalue("hosts") if request.param == "two hosts" else Place()
