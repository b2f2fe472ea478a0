"""What the device reaches at best: read and copy bandwidth, copies from pinned memory, bf16 matrix products."""

from collections.abc import Callable

import torch

from lorasrv_bench.gpu_records import Record
from lorasrv_bench.gpu_section import Section, check, distance
from lorasrv_bench.gpu_timing import Round, Timing, free_memory


def run(section: Section) -> None:
    for what, measure in {
        "read": _read,
        "copy": _copy,
        "to_device": _to_device,
        "matmul": _matmul,
    }.items():
        case = {"what": what}
        with section.case(case):
            timing, rate, error = measure(section)
            section.add(
                Record(
                    section=section.name,
                    case=case,
                    median_s=timing.median_s,
                    spread=timing.spread,
                    error=error,
                    values={"rate": rate},
                )
            )
        free_memory(section.device)


def _read(section: Section) -> tuple[Timing, float, float]:
    """A sum over the buffer, whose parts a reduction reads once; the best of a few shapes."""
    size = section.size.ceiling_bytes
    source = torch.ones(size // 4, dtype=torch.float32, device=section.device)
    best: tuple[Timing, float, float] | None = None
    for rows in (1 << 8, 1 << 12, 1 << 16):
        table = source.view(rows, -1)
        error = check(distance(table.sum(1), torch.full((rows,), table.shape[1], device=section.device)), 1e-3, "sum")
        timing = Round([lambda table=table: table.sum(1)], section.device).time(section.size.case_s)
        found = (timing, size / timing.median_s, error)
        best = found if best is None or found[1] > best[1] else best
    assert best is not None
    return best


def _copy(section: Section) -> tuple[Timing, float, float]:
    size = section.size.ceiling_bytes // 2
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=section.device)
    target = torch.zeros_like(source)
    target.copy_(source)
    error = check(float(not torch.equal(source, target)), 0.0, "a copy")
    timing = Round([lambda: target.copy_(source)], section.device).time(section.size.case_s)
    return timing, 2 * size / timing.median_s, error


def _to_device(section: Section) -> tuple[Timing, float, float]:
    size = min(section.size.ceiling_bytes // 4, 1 << 28)
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, pin_memory=section.device.type == "cuda")
    target = torch.zeros(size, dtype=torch.uint8, device=section.device)
    target.copy_(source)
    error = check(float(not torch.equal(source, target.cpu())), 0.0, "a copy")
    timing = Round([lambda: target.copy_(source, non_blocking=True)], section.device).time(section.size.case_s)
    return timing, size / timing.median_s, error


def _matmul(section: Section) -> tuple[Timing, float, float]:
    """The best of a few square sizes, on random data: zeros draw less power and run faster."""
    best: tuple[Timing, float, float] | None = None
    for n in section.size.matmul_sizes:
        a, b = (torch.randn(n, n, device=section.device).to(torch.bfloat16) for _ in range(2))
        product = a[:16] @ b
        error = check(distance(product, a[:16].double() @ b.double()), 1e-2, "a matrix product")
        timing = Round([_product(a, b)], section.device).time(section.size.case_s)
        found = (timing, 2 * n**3 / timing.median_s, error)
        best = found if best is None or found[1] > best[1] else best
    assert best is not None
    return best


def _product(a: torch.Tensor, b: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: a @ b
