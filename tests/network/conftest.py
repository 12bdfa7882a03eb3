"""Which tools are tried in which way: all of them in both take ten minutes, for `make soak`."""

import os

ALL = os.environ.get("PYRO_TEST_TOOLS") == "all"
DIRECT = ("test_apt", "test_cargo")
SECRET = ("test_pip", "test_npm", "test_git", "test_clients", "test_all_of_it")


def pytest_collection_modifyitems(config, items):
    def is_left_out(item):
        names = DIRECT if "[direct]" in item.name else SECRET
        return "network/test_real_tools" in str(item.path) and not ALL and not item.name.startswith(names)

    config.hook.pytest_deselected(items=[item for item in items if is_left_out(item)])
    items[:] = [item for item in items if not is_left_out(item)]
