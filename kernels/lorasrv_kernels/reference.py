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

from collections.abc import Callable

import torch
from torch import Tensor

from lorasrv_kernels.attention_work import AttentionWork
from lorasrv_kernels.tiles import ADDRESS_BYTES, HEADER_FIELDS, TILE_ROWS, Delta, Matrix, Module, Segments
from lorasrv_kernels.work import split_cols


def sgmv_shrink(
    x: Tensor,  # [num_tokens, in_features]
    pool: Tensor,  # [num_bytes], uint8
    segments: Segments,
    layer: int,
    modules: tuple[Module, ...],  # that share this input
    out: Tensor,  # float32 [num_splits, len(modules), num_tokens, >= max_rank]
    *,
    matmul: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> None:
    """out[:, m, t, :rank] = scale * module scale * A[m] @ x[t] for every token t of a segment, accumulated in fp32.

    out[s] sums over the columns [s * w, (s + 1) * w) of A alone, w = `split_cols(in_features, num_splits)`; readers add
    them in this order. Tokens of no segment, modules that the segment's adapter leaves alone and columns from its
    rank on are not written.
    """
    width = split_cols(x.shape[1], out.shape[0])
    for start, end, directory, scale in _each(segments):
        for index, module in enumerate(modules):
            header = _header(pool, directory, layer, module, segments.num_modules)
            if header is None:
                continue
            rank, first_a, _, module_scale = header
            y = torch.zeros(out.shape[0], end - start, rank, dtype=torch.float32, device=x.device)
            for row, col, tile in _tiles(pool, x.dtype, directory, first_a, rank, module.a):
                for split in range(col // width, -(-(col + tile.shape[1]) // width)):
                    low, high = max(col, split * width), min(col + tile.shape[1], (split + 1) * width)
                    part = matmul(x[start:end, low:high].float(), tile[:, low - col : high - col].float().T)
                    y[split, :, row : row + tile.shape[0]] += part
            out[:, index, start:end, :rank] = y * (scale * module_scale)


def sgmv_expand(
    h: Tensor,  # float32 [num_splits, len(modules), num_tokens, >= max_rank], as sgmv_shrink left it
    pool: Tensor,  # [num_bytes], uint8
    segments: Segments,
    layer: int,
    modules: tuple[Module, ...],
    out: Tensor,  # [num_tokens, sum of out_features], the modules' outputs side by side
    *,
    matmul: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> None:
    """out[t, columns of m] += B[m] @ sum(h[:, m, t, :rank]) for every token t of a segment, rounded once."""
    for start, end, directory, _ in _each(segments):
        first_col = 0
        for index, module in enumerate(modules):
            header = _header(pool, directory, layer, module, segments.num_modules)
            if header is not None:
                rank, _, first_b, _ = header
                target = out[start:end, first_col : first_col + module.b.cols]
                total = target.float()
                for row, col, tile in _tiles(pool, out.dtype, directory, first_b, rank, module.b):
                    rows = _sum_in_order(h[:, index, start:end, row : row + tile.shape[0]])
                    part = matmul(rows, tile.float())
                    total[:, col : col + tile.shape[1]] += part
                target.copy_(total)
            first_col += module.b.cols


def _sum_in_order(
    parts: Tensor,  # [num_parts, ...]
) -> Tensor:  # [...]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


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


def pack_linear(
    weight: Tensor,  # [out_features, in_features]
    *,
    keep: bool = False,
) -> Tensor:
    """What `linear` takes; here the weight itself. Others may put it into the weight's own memory, unless the weight is
    to be kept."""
    return weight


def linear(
    x: Tensor,  # [num_rows, in_features]
    weight: Tensor,  # as `pack_linear` gave it
    bias: Tensor | None,  # [out_features]
) -> Tensor:  # [num_rows, out_features]
    """x @ weight^T + bias."""
    return torch.nn.functional.linear(x, weight, bias)


def logits(
    x: Tensor,  # [num_rows, in_features]
    weight: Tensor,  # [vocab_size, in_features] as `pack_linear` gave it
    *,
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = linear,
) -> Tensor:  # float32 [num_rows, vocab_size]
    """x @ weight^T, to be read in fp32."""
    return linear(x, weight, None).float()


def project(
    x: Tensor,  # [num_tokens, in_features]
    weight: Tensor,  # [sum of out_features, in_features] as `pack_linear` gave it, the modules' weights stacked
    bias: Tensor | None,  # [sum of out_features]
    pool: Tensor,  # [num_bytes], uint8
    segments: Segments | None,
    layer: int,
    modules: tuple[Module, ...],
    *,
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = linear,
    shrink: Callable[[Tensor, Tensor, Segments, int, tuple[Module, ...], Tensor], None] = sgmv_shrink,
) -> tuple[Tensor, Delta | None]:  # [num_tokens, sum of out_features]
    """The base model's output, and what adapters add to it, for the function that reads the output next."""
    out = linear(x, weight, bias)
    if segments is None:
        return out, None
    h = torch.empty(1, len(modules), x.shape[0], segments.max_rank, dtype=torch.float32, device=x.device)
    shrink(x, pool, segments, layer, modules, h)
    return out, Delta(h=h, pool=pool, segments=segments, layer=layer, modules=modules)


def expand(
    delta: Delta | None,
    out: Tensor,  # [num_tokens, sum of out_features]
    *,
    sgmv: Callable[[Tensor, Tensor, Segments, int, tuple[Module, ...], Tensor], None] = sgmv_expand,
) -> None:
    """out += what the adapters add."""
    if delta is not None:
        sgmv(delta.h, delta.pool, delta.segments, delta.layer, delta.modules, out)


def by_rows(
    function: Callable[[Tensor], Tensor],
    x: Tensor,  # [num_rows, ...]
) -> Tensor:  # [num_rows, ...]
    """function(x), for a function that computes each row on its own."""
    return function(x)


def rms_norm(
    x: Tensor,  # [..., hidden]
    weight: Tensor,  # [hidden]
    eps: float,
) -> Tensor:  # [..., hidden]
    """x / sqrt(mean(x^2) + eps) in fp32, rounded to x's dtype, times weight."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def add_rms_norm(
    residual: Tensor,  # [num_tokens, hidden]
    out: Tensor,  # [num_tokens, hidden], of a linear module; may be written
    delta: Delta | None,
    weight: Tensor,  # [hidden]
    eps: float,
    *,
    expand: Callable[[Delta | None, Tensor], None] = expand,
    norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm,
) -> tuple[Tensor, Tensor]:  # [num_tokens, hidden], [num_tokens, hidden]
    """residual + out, with what the adapters add to `out`, and its `rms_norm`."""
    x = add(residual, out, delta, expand=expand)
    return x, norm(x, weight, eps)


def add(
    residual: Tensor,  # [num_tokens, hidden]
    out: Tensor,  # [num_tokens, hidden], of a linear module; may be written
    delta: Delta | None,
    *,
    expand: Callable[[Delta | None, Tensor], None] = expand,
) -> Tensor:  # [num_tokens, hidden]
    """residual + out, with what the adapters add to `out`."""
    expand(delta, out)
    return residual + out


def rope(
    x: Tensor,  # [num_tokens, num_heads, head_dim]
    cos: Tensor,  # [num_tokens, head_dim / 2], in x's dtype
    sin: Tensor,  # [num_tokens, head_dim / 2], in x's dtype
) -> Tensor:  # [num_tokens, num_heads, head_dim]
    """Rotate the pairs (x[..., i], x[..., i + head_dim / 2]) by the angle whose cosine and sine are given."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def silu_mul(
    gate_up: Tensor,  # [num_tokens, 2 * intermediate], of a linear module; may be written
    delta: Delta | None = None,
) -> Tensor:  # [num_tokens, intermediate]
    """silu(gate) * up of the two halves, with what the adapters add to them."""
    expand(delta, gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def write_kv(
    key: Tensor,  # [num_tokens, kv_heads, head_dim]
    value: Tensor,  # [num_tokens, kv_heads, head_dim]
    kv: Tensor,  # [num_pages, layers, 2, block_tokens, kv_heads, head_dim]
    layer: int,
    slots: Tensor,  # int64 [num_tokens], page * block_tokens + place in the block; all different
) -> None:
    """Put every token's key and value of one layer into its slot."""
    block_tokens = kv.shape[3]
    pages, places = slots // block_tokens, slots % block_tokens
    kv[:, layer, 0][pages, places] = key
    kv[:, layer, 1][pages, places] = value


def rope_write_kv(
    qkv: Tensor,  # [num_tokens, (num_heads + 2 * kv_heads) * head_dim], of a linear module; may be written
    delta: Delta | None,
    norms: tuple[Tensor, Tensor] | None,  # [head_dim] for queries and for keys
    eps: float,
    cos: Tensor,  # [num_tokens, head_dim / 2]
    sin: Tensor,  # [num_tokens, head_dim / 2]
    kv: Tensor,  # [num_pages, layers, 2, block_tokens, kv_heads, head_dim]
    layer: int,
    slots: Tensor,  # int64 [num_tokens]
    *,
    expand: Callable[[Delta | None, Tensor], None] = expand,
    norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm,
) -> Tensor:  # [num_tokens, num_heads, head_dim]
    """The queries, rotated; keys, rotated, and values go into their slots. What the adapters add comes first, then each
    head's `rms_norm` where the model has one."""
    expand(delta, qkv)
    kv_heads, head_dim = kv.shape[4:]
    heads = qkv.unflatten(1, (-1, head_dim))
    query, key, value = heads.split((heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    if norms is not None:
        query, key = norm(query, norms[0], eps), norm(key, norms[1], eps)
    write_kv(rope(key, cos, sin), value, kv, layer, slots)
    return rope(query, cos, sin)


def paged_attention(
    query: Tensor,  # [num_tokens, num_heads, head_dim]
    kv: Tensor,  # [num_pages, layers, 2, block_tokens, kv_heads, head_dim]
    layer: int,
    block_tables: Tensor,  # int32 [num_sequences, max_blocks], pages in token order; what lies behind is not read
    query_starts: Tensor,  # int32 [num_sequences + 1], rows of `query` by sequence
    context_lengths: Tensor,  # int32 [num_sequences], tokens in the pages, those of this step included
    window: int | None,  # >= 1, the last positions that a row sees; None for all
    out: Tensor,  # [num_tokens, num_heads, head_dim]
    *,
    work: AttentionWork | None = None,  # the same in lists, for kernels; not read here
) -> None:
    """Causal attention of each sequence's last query rows over all its tokens, in fp32, rounded once.

    A sequence with n rows and a context of c tokens has its row i at position p = c - n + i, which sees the positions
    j <= p, with a window those of p - window < j <= p: a prefill chunk, a whole prompt and a decode row (n = 1) are the
    same thing. Pages that no row sees are not read. Query head h reads kv head h // (num_heads / kv_heads). Scores are
    scaled by 1 / sqrt(head_dim).
    """
    block_tokens = kv.shape[3]
    starts, contexts = query_starts.tolist(), context_lengths.tolist()
    for sequence, context in enumerate(contexts):
        start, end = starts[sequence], starts[sequence + 1]
        first_row = context - (end - start)
        first_block = 0 if window is None else max(0, first_row - window + 1) // block_tokens
        first = first_block * block_tokens
        pages = block_tables[sequence, first_block : -(-context // block_tokens)].long()
        key, value = (kv[pages, layer, which].flatten(0, 1)[: context - first].float() for which in (0, 1))
        out[start:end] = attend(query[start:end], key, value, first_row, first, window)


def attend(
    query: Tensor,  # [num_rows, num_heads, head_dim], of the positions from `first_row` on
    key: Tensor,  # float32 [num_keys, kv_heads, head_dim], of the positions from `first_key` on
    value: Tensor,  # float32 [num_keys, kv_heads, head_dim]
    first_row: int,
    first_key: int,
    window: int | None,
) -> Tensor:  # [num_rows, num_heads, head_dim]
    """Attention of one sequence's rows over its keys, as in `paged_attention`. Every row sees a key."""
    num_rows, num_keys = query.shape[0], key.shape[0]
    q = query.float().unflatten(1, (key.shape[1], -1))  # [n, kv_heads, group, head_dim]
    scores = torch.einsum("nkgd,ckd->kgnc", q, key) * query.shape[2] ** -0.5
    row = torch.arange(first_row, first_row + num_rows, device=query.device).unsqueeze(1)  # [n, 1]
    position = torch.arange(first_key, first_key + num_keys, device=query.device)  # [c]
    hidden = position > row
    if window is not None:
        hidden |= position <= row - window
    weights = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
    return torch.einsum("kgnc,ckd->nkgd", weights, value).flatten(1, 2).to(query.dtype)


def philox(
    counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int],  # 32-bit words in int64, broadcastable
    key: tuple[Tensor | int, Tensor | int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four words of 32 random bits, in int64, for every counter under its key.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); the same bits as `tl.philox`.
    """
    mask = 0xFFFFFFFF
    # Numbers stay without dimensions, so that they go with tensors of any device.
    c0, c1, c2, c3 = (torch.as_tensor(word, dtype=torch.int64) for word in counter)
    k0, k1 = (torch.as_tensor(word, dtype=torch.int64) for word in key)
    for _ in range(10):
        # The 64-bit products wrap, which leaves their bits as in unsigned arithmetic.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & mask) ^ c1 ^ k0, p1 & mask, ((p0 >> 32) & mask) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def edit_logits(
    logits: Tensor,  # float32 [num_rows, vocab_size], changed in place
    repeated: Tensor,  # int64 [2, num_repeated], (row, token id) pairs, all different
    penalties: Tensor,  # float32 [num_repeated], > 0
    added: Tensor,  # int64 [2, num_added], pairs, all different
    amounts: Tensor,  # float32 [num_added]
    masked: Tensor,  # int64 [2, num_masked], pairs
) -> None:
    """What requests change before tokens are drawn, in this order: the repeated logits are divided by their penalty
    where positive and multiplied by it elsewhere; the amounts are added; the masked logits become -inf.

    Rows that no pair names are not touched.
    """
    found = logits[repeated[0], repeated[1]]
    logits[repeated[0], repeated[1]] = torch.where(found > 0, found / penalties, found * penalties)
    logits[added[0], added[1]] += amounts
    logits[masked[0], masked[1]] = float("-inf")


def token_logprobs(
    logits: Tensor,  # float32 [num_rows, vocab_size]
    token_ids: Tensor,  # int64 [num_rows]
    num_top: int,  # at most vocab_size
) -> tuple[Tensor, Tensor, Tensor]:  # float32 [num_rows], float32 [num_rows, num_top], int64 [num_rows, num_top]
    """Log-softmax at the row's token, and the largest ones, largest first, with their token ids."""
    logprobs = logits.log_softmax(-1)
    top, ids = logprobs.topk(num_top, dim=-1)
    return logprobs.gather(-1, token_ids.unsqueeze(1)).squeeze(1), top, ids


def sample(
    logits: Tensor,  # [num_rows, vocab_size]
    temperature: Tensor,  # float32 [num_rows], >= 0
    top_p: Tensor,  # float32 [num_rows], in (0, 1]
    top_k: Tensor,  # int64 [num_rows], >= 1; vocab_size or more keeps all
    min_p: Tensor | None,  # float32 [num_rows], in [0, 1]; None where it is 0 in every row
    seeds: Tensor,  # int64 [num_rows], the 64 bits of the seed
    samples: Tensor,  # int64 [num_rows], the number of the row's sample among those of its seed
    positions: Tensor,  # int64 [num_rows], of the token that is drawn
    whole: Tensor,  # int64 [num_whole], the rows of a temperature above 0 whose top_p and top_k keep all tokens
    cut: Tensor,  # int64 [num_cut], the other rows of a temperature above 0
) -> tuple[Tensor, Tensor]:  # int64 [num_rows], bool [num_rows]
    """The token drawn for every row, and whether the row's logits allowed it: a row that holds NaN or +inf, or
    nothing but -inf, is False and its token means nothing.

    Temperature 0 takes the largest logit, the lowest id of equal ones. Otherwise, on logits / temperature, the top_k
    most likely tokens are kept, of those the fewest whose share reaches top_p (equal ones by lowest id), of those the
    ones at least min_p times as likely as the likeliest, and the draw is Gumbel-max: the largest
    logit / temperature - log(-log(u)), the lowest id of equal ones, u in (0, 1) from `philox` keyed by the seed at the
    counter (token id // 4, position, sample, 0), word token id % 4. So a row's draw depends on nothing else in the
    batch. Which rows need which work the caller knows before, so that nobody waits for the device.
    """
    valid = logits.amax(-1).isfinite()
    tokens = logits.argmax(-1)
    for rows in (whole, cut):
        if len(rows):
            scaled = scale_logits(logits[rows], temperature[rows])
            if rows is cut:
                scaled = keep_likeliest(scaled, top_p[rows], top_k[rows])
            if min_p is not None:
                # The likeliest token, whose number is 0, always stays, whatever top_k and top_p have left out.
                scaled.masked_fill_(scaled < min_p[rows].double().log().unsqueeze(1), float("-inf"))
            noise = _gumbel(seeds[rows], samples[rows], positions[rows], logits.shape[1])
            tokens[rows] = scaled.add_(noise).argmax(-1)
    return tokens, valid


def scale_logits(
    logits: Tensor,  # [num_rows, vocab_size]
    temperature: Tensor,  # float32 [num_rows], > 0
) -> Tensor:  # float64 [num_rows, vocab_size]
    """Logits / temperature, less the largest one, beside which noise would be lost where the temperature is tiny."""
    own = logits.double()
    return (own - own.amax(-1, keepdim=True)) / temperature.double().unsqueeze(1)


def keep_likeliest(
    scaled: Tensor,  # float64 [num_rows, vocab_size]
    top_p: Tensor,  # float32 [num_rows]
    top_k: Tensor,  # int64 [num_rows]
) -> Tensor:  # float64 [num_rows, vocab_size]
    """-inf in place of the tokens that `sample`'s top_k and top_p leave out."""
    ordered, ids = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scaled.shape[1], device=scaled.device)
    ordered = ordered.masked_fill(rank >= top_k.unsqueeze(1), float("-inf"))
    probs = ordered.softmax(-1)
    before = probs.cumsum(-1) - probs
    ordered = ordered.masked_fill((before >= top_p.double().unsqueeze(1)) & (rank > 0), float("-inf"))
    return torch.empty_like(ordered).scatter_(-1, ids, ordered)


def _gumbel(seeds: Tensor, samples: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """float64 [num_rows, vocab_size]: standard Gumbel noise."""
    mask = 0xFFFFFFFF
    quads = torch.arange(-(-vocab_size // 4), device=seeds.device)
    key = (seeds.unsqueeze(1) & mask, (seeds.unsqueeze(1) >> 32) & mask)
    words = philox((quads, positions.unsqueeze(1), samples.unsqueeze(1), 0), key)
    bits = torch.stack(words, dim=-1).flatten(-2)[:, :vocab_size]
    uniform = (bits.double() + 0.5) * 2.0**-32
    return -(-uniform.log()).log()
