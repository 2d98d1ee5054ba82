"""Machines that serve under a TVM RPC tracker: which there are, and what one of them answers.

No wait is without an end: TVM's own sessions wait for a tracker, and in its queue, for ever. A session therefore lives
in a process of its own (`in_session`), which ends at its time limit. TVM is imported on use.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, TypeVar

from opcompile.errors import TargetError, UnknownTargetError
from opcompile.trials import CandidateFailed, failed

# A session whose connection broke is tried this many times.
_ATTEMPTS = 3
# How long a tracker may take to answer; how long one request may wait in its queue before it is asked
# whether there is any server left; how long to wait for a server in all. Seconds.
_ANSWER_S = 10
_QUEUE_S = 20
_FREE_S = 600

Answer = dict[str, Any]
Asked = TypeVar("Asked")
Found = TypeVar("Found")


# TVM's own server.
_TVMS = "tvm.exec.rpc_server"


@dataclass(frozen=True, slots=True)
class Farm:
    """The servers that the tracker at ``host:port`` has for ``key``; the module ``serving`` starts one."""

    host: str
    port: int
    key: str
    serving: str = _TVMS

    @classmethod
    def named(cls, tracker: str | None, key: str | None, serving: str = _TVMS) -> Farm | None:
        """Read ``HOST:PORT``, and ask the tracker for such servers; None where neither word is given.

        Raises `UnknownTargetError` for one word without the other, or in another form, `TargetError` where there is no
        answer, or no server for the key.
        """
        if tracker is None and key is None:
            return None
        if tracker is None or key is None:
            raise UnknownTargetError(
                "a tracker and a key go together: HOST:PORT of a TVM RPC tracker, and the key of its servers"
            )
        farm = cls(*address(tracker), key, serving)
        farm.servers()
        return farm

    def servers(self) -> int:
        """Count them. Raises `TargetError` where there is none, or no answer."""
        keys, at = listed(self.host, self.port), f"{self.host}:{self.port}"
        if self.key not in keys:
            others = f"it has servers for: {', '.join(sorted(set(keys)))}" if keys else "it has no server at all"
            # TVM's server asks nobody else how many threads it has
            threads = "TVM_NUM_THREADS=1 " if self.serving == _TVMS else ""
            raise TargetError(
                f"the RPC tracker {at} has no server for key {self.key!r}; {others}; start one with "
                f"`{threads}python -m {self.serving} --tracker {at} --key {self.key}`"
            )
        return keys.count(self.key)

    def tells(self, device: str) -> str:
        """Say which ``device`` measured, and that it was one of these."""
        return f"{device}, by RPC, key {self.key}"

    def answer(self, job: Answer, run: Callable[[Answer], Answer]) -> Answer:
        """Let a server answer ``job``: ``run`` starts the process that is `in_session`.

        ``job["session_s"]`` is how long the server may take, ``job["limit_s"]`` the process once it has a server.
        Waits for a free one; a connection that broke is tried again. Raises `CandidateFailed` where it broke each
        time, `TargetError` where no server is left, or none is free for ten minutes.
        """
        waiting = {"tracker": [self.host, self.port, self.key], "queue_s": _QUEUE_S}
        job = {**job, **waiting, "limit_s": job["limit_s"] + _QUEUE_S}
        answer, broken, waited_s = run(job), 1, 0
        while answer.get("failed") in ("queue", "connection"):
            if answer["failed"] == "queue":
                servers, waited_s = self.servers(), waited_s + _QUEUE_S
                if waited_s >= _FREE_S:
                    raise TargetError(f"none of the {servers} servers for key {self.key!r} was free in {_FREE_S} s")
            elif broken < _ATTEMPTS:
                broken += 1
            else:
                raise CandidateFailed(f"the connection broke {broken} times: {answer['error']}")
            answer = run(job)
        return answer

    def each(self, measure: Callable[[Asked], Found], asked: Sequence[Asked]) -> Iterator[Found]:
        """Yield what ``measure`` finds, as soon as it is there, on all servers at once.

        Where it raises `TargetError`, what is running is still waited for, and yielded, before that is raised.
        """
        if not asked:
            return
        lost: TargetError | None = None
        pool = ThreadPoolExecutor(self.servers())
        try:
            running = [pool.submit(measure, one) for one in asked]
            for future in as_completed(running):
                try:
                    if not future.cancelled():
                        yield future.result()
                except TargetError as error:
                    lost = error
                    pool.shutdown(wait=False, cancel_futures=True)
        finally:
            pool.shutdown(cancel_futures=True)
        if lost is not None:
            raise lost


def address(tracker: str) -> tuple[str, int]:
    """Read ``HOST:PORT``. Raises `UnknownTargetError`."""
    host, colon, port = str(tracker).rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UnknownTargetError(f"tracker {tracker!r} is not of the form HOST:PORT, like 192.168.1.2:9190")
    return host.strip("[]"), int(port)


def listed(host: str, port: int) -> list[str]:
    """Return the key of each server that a tracker has. Raises `TargetError` where it does not answer."""
    from tvm.rpc.base import TrackerCode

    try:
        summary = _ask_tracker((host, port), [TrackerCode.SUMMARY], _ANSWER_S, _ANSWER_S)
        return [str(server["key"]).removeprefix("server:") for server in summary["server_info"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TargetError(
            f"the RPC tracker {host}:{port} does not answer ({error}); start one with "
            f"`python -m tvm.exec.rpc_tracker --host {host} --port {port} --port-end {port + 1}`"
        ) from error


def _ask_tracker(tracker: tuple[str, int], message: list[Any], connect_s: float, answer_s: float) -> Any:
    """Send one message to a TVM RPC tracker and return what it answers. Raises OSError, TimeoutError included.

    TVM's own `TrackerSession` waits a minute for the connection, and for the answer without limit.
    """
    from tvm.rpc import base

    with socket.create_connection(tracker, timeout=connect_s) as connection:
        connection.sendall(struct.pack("<i", base.RPC_TRACKER_MAGIC))
        if struct.unpack("<i", base.recvall(connection, 4))[0] != base.RPC_TRACKER_MAGIC:
            raise OSError("it is not a TVM RPC tracker")
        connection.settimeout(answer_s)
        base.sendjson(connection, message)
        code, value = base.recvjson(connection)
    if code != base.TrackerCode.SUCCESS:
        raise OSError(f"the tracker answered with code {code}")
    return value


# --- in the process of a session ---


def in_session(job: Answer, answered: Callable[[Any], Answer], blame: str = "candidate") -> Answer:
    """Return what ``answered`` makes of a session on a server of ``job``'s tracker and key.

    What goes wrong is a failed answer too: no server was free (``queue``), the ``connection`` broke, or it was what
    ``blame`` says, since the server is still there, or ended the session at its time limit.
    """
    from tvm import rpc
    from tvm.rpc import base

    host, port, key = job["tracker"]
    request = [base.TrackerCode.REQUEST, key, "", 1]
    try:
        server = _ask_tracker((host, port), request, job["queue_s"], job["queue_s"])
    except (OSError, ValueError) as error:
        return failed("queue", error)
    session = None
    try:
        session = rpc.connect(*server, session_timeout=job["session_s"])
        return answered(session)
    except Exception as error:  # noqa: BLE001 (the next lines find out whose it is)
        expired = "RPCSessionTimeoutError" in str(error)
        return failed(blame if expired or _alive(session) else "connection", error)


def _alive(session: Any) -> bool:
    """Whether the server still answers."""
    try:
        session.get_function("runtime.NumThreads")()
    except Exception:  # noqa: BLE001 (a broken connection has many names)
        return False
    return True
