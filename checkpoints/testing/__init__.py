"""For the tests of an application: databases that are thrown away, and a handler without consumer.

It is a plugin of pytest for those who name it, in the conftest.py of the root:

    pytest_plugins = ["checkpoints.testing"]

`process` and `process_async` do without pytest. A conftest.py may import them besides, for there is
no `assert` here for pytest to rewrite: PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

from checkpoints.testing._processing import NothingToProcess, process, process_async

__all__ = ["NothingToProcess", "process", "process_async"]

pytest_plugins = ["checkpoints.testing._fixtures"]
