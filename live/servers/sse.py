"""Server-sent events, as they come in pieces of any size."""

MAX_EVENT_BYTES = 4 * 2**20


class EventTooLongError(ValueError):
    """A server sent an event that does not end."""


class EventReader:
    """Finds the data of each event in a stream of bytes.

    Lines end with LF or CRLF; comments and fields other than `data` are passed over, and several
    lines of data are joined, as in section 9.2 of the HTML standard.
    """

    def __init__(self, max_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._rest = bytearray()  # a line that has not ended
        self._scanned = 0  # bytes of it without an end
        self._data: list[bytes] = []  # lines of an event that has not ended
        self._bytes = 0  # in them

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of the events that this piece ends.

        Raises:
            EventTooLongError: if the event under way has more bytes than allowed.
        """
        found: list[bytes] = []
        self._rest += piece
        start = 0
        while (end := self._rest.find(b"\n", max(self._scanned, start))) >= 0:
            self._line(bytes(self._rest[start:end]).removesuffix(b"\r"), found)
            start = end + 1
        del self._rest[:start]
        self._scanned = len(self._rest)
        if self._bytes + len(self._rest) > self._max_bytes:
            raise EventTooLongError(f"an event of more than {self._max_bytes} bytes")
        return found

    def _line(self, line: bytes, found: list[bytes]) -> None:
        if not line:
            if self._data:
                found.append(b"\n".join(self._data))
            self._data, self._bytes = [], 0
        elif line.startswith(b"data:"):
            data = line[5:].removeprefix(b" ")
            self._data.append(data)
            self._bytes += len(data)
            if self._bytes > self._max_bytes:
                raise EventTooLongError(f"an event of more than {self._max_bytes} bytes")
