"""Readers of traces of LLM serving: one row is (arrival in s, prompt tokens, output tokens)."""

from datetime import UTC, datetime

from sim.traces.table import (
    MAX_TOKENS,
    BadRows,
    BadValueError,
    Table,
    read_csv,
    read_jsonl,
    seconds,
    tokens,
)

LlmRow = tuple[float, int, int]


def azure_llm(path: str, bad_rows: BadRows) -> Table[LlmRow]:
    """Azure LLM inference traces 2023 and 2024 (github.com/Azure/AzurePublicDataset)."""

    def parse(values: list[str]) -> LlmRow:
        try:
            moment = datetime.fromisoformat(values[0])
        except ValueError:
            raise BadValueError("TIMESTAMP", values[0], "a date and time, ISO 8601") from None
        if moment.tzinfo is None:  # 2023 writes no offset, 2024 +00:00
            moment = moment.replace(tzinfo=UTC)
        prompt = tokens("ContextTokens", values[1])
        return moment.timestamp(), prompt, tokens("GeneratedTokens", values[2])

    return read_csv(path, ("TIMESTAMP", "ContextTokens", "GeneratedTokens"), parse, bad_rows)


def burstgpt(path: str, bad_rows: BadRows) -> Table[LlmRow]:
    """BurstGPT with six or with eight columns (Wang et al., arXiv 2401.17644).

    A request that failed there has 0 response tokens: such a row is malformed.
    """

    def parse(values: list[str]) -> LlmRow:
        return (
            seconds("Timestamp", values[0]),
            tokens("Request tokens", values[1]),
            tokens("Response tokens", values[2]),
        )

    return read_csv(path, ("Timestamp", "Request tokens", "Response tokens"), parse, bad_rows)


def mooncake(path: str, bad_rows: BadRows) -> Table[LlmRow]:
    """Mooncake traces, JSON lines with timestamps in ms (Qin et al., FAST 2025)."""

    def count(row: dict[str, object], key: str) -> int:
        value = row.get(key)
        if type(value) is not int or not 1 <= value <= MAX_TOKENS:
            raise BadValueError(key, value, f"an integer from 1 to {MAX_TOKENS}")
        return value

    def parse(row: dict[str, object]) -> LlmRow:
        prompt, output = count(row, "input_length"), count(row, "output_length")
        value = row.get("timestamp")
        if type(value) not in (int, float):
            raise BadValueError("timestamp", value, "a number of milliseconds ≥ 0")
        return seconds("timestamp", str(value)) / 1000, prompt, output

    return read_jsonl(path, parse, bad_rows)
