"""Torch oracles of the kernels: the meaning, plainly; correct on any device, fast on none.

Semantics of an adapter's directory, the one place where it is stated:

    The pool is bytes; an address counts units of 128 bytes from its start. An adapter's directory is an int32 array
    at an address, inside one page:

        header[layer, module] = (rank, first_a, first_b, scale)     at int32 offset (layer * num_modules + module) * 4
        address[tile]                                               behind the headers

    rank 0 means that the adapter leaves this module alone. `first_a` and `first_b` are int32 offsets, from the
    directory's start, of the addresses of A's and B's tiles; `scale` holds the bits of the fp32 alpha/r (or what
    stands for it). A matrix `[rank, cols]` (B transposed) is cut to row blocks of 16 rank rows, the last one as high
    as the rows that are left; a row block of n rows is cut to chunks of `Matrix.chunk_for(n)` columns, the last one
    as wide as is left. Addresses stand row block by row block, chunk by chunk; a tile is contiguous, `[rows, cols]`.
"""

import torch
from torch import Tensor

from lorasrv_kernels.tiles import ADDRESS_BYTES, HEADER_FIELDS, TILE_ROWS, Matrix, Module, Segments


def sgmv_shrink(
    x: Tensor,  # [num_tokens, in_features]
    pool: Tensor,  # [num_bytes], uint8
    segments: Segments,
    layer: int,
    modules: tuple[Module, ...],  # that share this input
    out: Tensor,  # float32 [len(modules), num_tokens, >= max_rank]
) -> None:
    """out[m, t, :rank] = scale * module scale * A[m] @ x[t] for every token t of a segment, accumulated in fp32.

    Tokens of no segment, modules that the segment's adapter leaves alone and columns from its rank on are not written.
    """
    for start, end, directory, scale in _each(segments):
        for index, module in enumerate(modules):
            header = _header(pool, directory, layer, module, segments.num_modules)
            if header is None:
                continue
            rank, first_a, _, module_scale = header
            y = torch.zeros(end - start, rank, dtype=torch.float32, device=x.device)
            for row, col, tile in _tiles(pool, x.dtype, directory, first_a, rank, module.a):
                y[:, row : row + tile.shape[0]] += x[start:end, col : col + tile.shape[1]].float() @ tile.float().T
            out[index, start:end, :rank] = y * (scale * module_scale)


def sgmv_expand(
    h: Tensor,  # float32 [len(modules), num_tokens, >= max_rank], as sgmv_shrink left it
    pool: Tensor,  # [num_bytes], uint8
    segments: Segments,
    layer: int,
    modules: tuple[Module, ...],
    out: Tensor,  # [num_tokens, sum of out_features], the modules' outputs side by side
) -> None:
    """out[t, columns of m] += B[m] @ h[m, t, :rank] for every token t of a segment, rounded once to out's dtype."""
    for start, end, directory, _ in _each(segments):
        first_col = 0
        for index, module in enumerate(modules):
            header = _header(pool, directory, layer, module, segments.num_modules)
            if header is not None:
                rank, _, first_b, _ = header
                target = out[start:end, first_col : first_col + module.b.cols]
                total = target.float()
                for row, col, tile in _tiles(pool, out.dtype, directory, first_b, rank, module.b):
                    part = h[index, start:end, row : row + tile.shape[0]] @ tile.float()
                    total[:, col : col + tile.shape[1]] += part
                target.copy_(total)
            first_col += module.b.cols


def _each(segments: Segments) -> list[tuple[int, int, int, float]]:
    return list(
        zip(
            segments.starts.tolist(),
            segments.ends.tolist(),
            segments.directories.tolist(),
            segments.scales.tolist(),
            strict=True,
        )
    )


def _header(
    pool: Tensor, directory: int, layer: int, module: Module, num_modules: int
) -> tuple[int, int, int, float] | None:
    at = directory * (ADDRESS_BYTES // 4) + (layer * num_modules + module.index) * HEADER_FIELDS
    fields = pool.view(torch.int32)[at : at + HEADER_FIELDS]
    rank, first_a, first_b, _ = fields.tolist()
    return (rank, first_a, first_b, fields[3:].view(torch.float32).item()) if rank else None


def _tiles(
    pool: Tensor, dtype: torch.dtype, directory: int, first: int, rank: int, matrix: Matrix
) -> list[tuple[int, int, Tensor]]:
    """(row, col, tile) for every tile of a matrix, each a view of the pool."""
    elems = pool.view(dtype)
    places: list[tuple[int, int, int, int]] = []
    for row in range(0, rank, TILE_ROWS):
        num_rows = min(TILE_ROWS, rank - row)
        chunk = matrix.chunk_for(num_rows)
        places += [(row, num_rows, col, min(chunk, matrix.cols - col)) for col in range(0, matrix.cols, chunk)]
    at = directory * (ADDRESS_BYTES // 4) + first
    addresses = pool.view(torch.int32)[at : at + len(places)].tolist()
    tiles: list[tuple[int, int, Tensor]] = []
    for (row, num_rows, col, num_cols), address in zip(places, addresses, strict=True):
        begin = address * (ADDRESS_BYTES // elems.element_size())
        tiles.append((row, col, elems[begin : begin + num_rows * num_cols].view(num_rows, num_cols)))
    return tiles
