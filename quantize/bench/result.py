"""What a bench run measured: plain, frozen, the same in measurements.json and behind --json.

In: JSON or samples' summaries. Out: BenchResult. All times are in seconds, all sizes in bytes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Api = Literal["openai", "chat"]
Count = Annotated[int, Field(ge=0, le=1 << 62)]


class _ResultModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Percentiles(_ResultModel):
    """Nearest-rank percentiles in seconds over the requests that succeeded."""

    p50: float
    p95: float
    p99: float
    mean: float


class Cell(_ResultModel):
    """One shape at one concurrency (closed loop) or one arrival rate (open loop), warm-up left out.

    first_token: from sending (open loop: from the intended arrival) to the first token. latency: to the end of the
    answer. token_gap: mean seconds between tokens of one answer. seconds: first arrival to last answer. without_text:
    streamed answers that were reasoning or calls of tools alone.
    """

    shape: str
    prompt_tokens: int
    output_tokens: int
    concurrency: int | None
    rate: float | None
    requests: Count
    succeeded: Count
    seconds: float
    first_token: Percentiles | None
    latency: Percentiles | None
    token_gap: Percentiles | None
    requests_per_second: float
    output_tokens_per_second: float | None
    mean_prompt_tokens: float | None
    mean_output_tokens: float | None
    errors: dict[str, Count]
    error_examples: dict[str, str]
    without_text: Count = 0

    @property
    def error_rate(self) -> float:
        """Failed requests over all requests."""
        return sum(self.errors.values()) / self.requests if self.requests else 0.0

    @property
    def load(self) -> str:
        """`x 4`, or `2/s`."""
        return f"x {self.concurrency}" if self.rate is None else f"{self.rate:g}/s"


class MemoryUse(_ResultModel):
    """Bytes: the server ready and no request sent yet; after the warm-up; the most while it was measured.

    scope: "process" (the server and its children), or "device" (all that is on the GPUs, where a driver does not tell
    processes apart).
    """

    scope: Literal["process", "device"]
    before_load_bytes: int
    after_warm_up_bytes: int
    peak_bytes: int


class With(_ResultModel):
    """With what it was measured. context, threads, concurrency (answers at once): of a server started for it."""

    server: str
    model: str
    runtime: dict[str, str]
    context: int | None
    threads: int | None
    concurrency: int | None = None
    processor: str
    cores: int
    ram_bytes: int
    gpus: list[str]
    system: str
    client: str

    @property
    def machine(self) -> str:
        """Processor, cores and GPUs, in words."""
        return ", ".join([self.processor, f"{self.cores} cores", *self.gpus])


class BenchResult(_ResultModel):
    """One run of `quantize bench`.

    tokens_counted_by: "usage" (the server says how many), "chunks" (one streamed piece is taken for one token), or None
    (no count). prompts_hash: sha256 of the prompts.
    """

    measured_at: str
    api: Api
    loop: Literal["closed", "open"]
    timeout_seconds: float
    warm_up_requests: int
    requests_per_cell: int
    max_seconds_per_cell: float
    seed: int
    prompts_hash: str
    tokens_counted_by: Literal["usage", "chunks"] | None
    ready_seconds: float | None
    cells: list[Cell]
    ram: MemoryUse | None
    vram: MemoryUse | None
    measured_with: With

    @property
    def requests(self) -> int:
        """Requests of all cells."""
        return sum(cell.requests for cell in self.cells)

    @property
    def succeeded(self) -> int:
        """Requests of all cells that succeeded."""
        return sum(cell.succeeded for cell in self.cells)

    @property
    def errors(self) -> dict[str, int]:
        """Kind of error -> how many, over all cells."""
        found: dict[str, int] = {}
        for cell in self.cells:
            for kind, count in cell.errors.items():
                found[kind] = found.get(kind, 0) + count
        return dict(sorted(found.items()))

    @property
    def error_rate(self) -> float | None:
        """Failed requests over all requests; None where nothing was asked."""
        return sum(self.errors.values()) / self.requests if self.requests else None

    @property
    def slowest(self) -> Cell | None:
        """The cell with the longest 95th percentile of latency: the one that a limit is held against."""
        timed = [cell for cell in self.cells if cell.latency is not None]
        return max(timed, key=lambda cell: cell.latency.p95 if cell.latency else 0.0, default=None)

    @property
    def peak_bytes(self) -> int | None:
        """The most memory at the peak: of the GPUs where there is one, else RAM; None where it was not seen."""
        use = self.vram or self.ram
        return use.peak_bytes if use else None

    def as_json(self) -> dict[str, Any]:
        """Plain data, with the error rates that are worked out."""
        data = self.model_dump(mode="json")
        for cell, row in zip(self.cells, data["cells"], strict=True):
            row["error_rate"] = cell.error_rate
        return {**data, "requests": self.requests, "errors": self.errors, "error_rate": self.error_rate}
