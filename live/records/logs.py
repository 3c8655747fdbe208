"""Structured logs: one JSON object a line on stderr, through the standard library.

What a line is about is its `event`; there are never prompts, answers or keys in it.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

from live.call import Call, RefusalError
from live.decider import Fault
from live.records.records import Records

_FIELDS = "fields"  # of a record, where they are


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: time, level, logger, event and the fields given with it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; a traceback goes into `error`."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, _FIELDS, {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure(level: str, stream: TextIO = sys.stderr) -> None:
    """Let everything of the process be logged as JSON lines from a level on, warnings too."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.captureWarnings(True)
    logging.getLogger("jax").setLevel(logging.WARNING)  # it tells which devices it did not find


def note(logger: logging.Logger, event: str, level: int = logging.INFO, **fields: object) -> None:
    """Log an event with its fields."""
    if logger.isEnabledFor(level):
        logger.log(level, event, extra={_FIELDS: fields})


class Journal(Records):
    """A line for the end of each request, and for whatever befalls replicas and policies."""

    def __init__(self) -> None:
        self._log = logging.getLogger("live.journal")

    def failed(self, call: Call, reason: str) -> None:
        """As of `Records`."""
        note(
            self._log, "attempt failed", logging.WARNING, request_id=call.incoming.request_id,
            replica=call.replica, attempt=call.attempts, committed=call.committed, reason=reason,
        )  # fmt: skip

    def ended(self, call: Call) -> None:
        """As of `Records`; what a refusal says to the client is left out, it may quote him."""
        if not self._log.isEnabledFor(logging.INFO):
            return
        incoming, decision, end = call.incoming, call.decision, call.end
        refused = isinstance(end, RefusalError)
        note(
            self._log, "request ended",
            request_id=incoming.request_id,
            endpoint=incoming.endpoint,
            task=incoming.task,
            pinned=incoming.model is not None,
            replica=call.replica,
            outcome=end.code if isinstance(end, RefusalError) else end and end.reason,
            status=end.status if isinstance(end, RefusalError) else 200,
            by=decision and decision.by,
            fault=decision and decision.fault,
            attempts=call.attempts,
            prompt_tokens=call.prompt_tokens,
            tokens=call.tokens,
            slack_s=_rounded(call.slack_s),
            decision_s=None if decision is None else _rounded(decision.seconds),
            ttft_s=_rounded(call.first_token_s - incoming.arrived_s) if call.tokens else None,
            e2e_s=_rounded(call.ended_s - incoming.arrived_s),
            predicted_e2e_s=None if refused else _rounded(_predicted_e2e_s(call)),
        )  # fmt: skip

    def fault(self, role: str, fault: Fault, reason: str) -> None:
        """As of `Records`."""
        note(self._log, "policy failed", logging.WARNING, role=role, fault=fault, reason=reason)

    def up(self, replica: str) -> None:
        """As of `Records`."""
        note(self._log, "replica up", replica=replica)

    def down(self, replica: str, reason: str) -> None:
        """As of `Records`."""
        note(self._log, "replica down", logging.WARNING, replica=replica, reason=reason)


def _predicted_e2e_s(call: Call) -> float | None:
    """From the arrival, as predicted at the decision."""
    if call.predicted is None:
        return None
    return call.sent_s - call.incoming.arrived_s + call.predicted.finish_s


def _rounded(seconds: float | None) -> float | None:
    """To microseconds."""
    return None if seconds is None else round(seconds, 6)
