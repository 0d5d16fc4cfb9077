"""Container tests run when asked for, `pytest -m container`: they build real images for minutes."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", "container: builds and runs real images (root, buildah)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what was not asked for, with the command that asks."""
    if "container" in config.getoption("markexpr"):
        return
    for item in items:
        if item.get_closest_marker("container"):
            item.add_marker(pytest.mark.skip(reason="builds images: pytest -m container"))
