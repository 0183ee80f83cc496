"""How the Gluon kernels walk a tile table and mask partial blocks (see tiles/table.py)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def write_scalar(numbers, at, number):
    """Puts an int32 into shared memory, from a partition of one warp; a barrier has to follow."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    numbers.index(at).store(gl.full([1], 0, gl.int32, layout) + number)


@gluon.jit
def read_scalar(numbers, at, NUM_WARPS: gl.constexpr = 4):
    """Gets it, in a partition of so many warps."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [NUM_WARPS], [0])
    return gl.max(numbers.index(at).load(layout), 0)


@gluon.jit
def load_row(at):
    """The numbers of a tile: (tile, list offset, piece ends, piece offsets, window, number of sinks)."""
    ends = (gl.load(at + 2), gl.load(at + 3), gl.load(at + 4), gl.load(at + 5), gl.load(at + 6), gl.load(at + 7))
    offsets = (gl.load(at + 8), gl.load(at + 9), gl.load(at + 10), gl.load(at + 11), gl.load(at + 12), gl.load(at + 13))
    return gl.load(at), gl.load(at + 1), ends, offsets, gl.load(at + 14), gl.load(at + 15)


@gluon.jit
def block_at(i, listed, lists, at, ends, offsets):
    """The block that step i visits."""
    offset = offsets[5]
    offset = gl.where(i < ends[4], offsets[4], offset)
    offset = gl.where(i < ends[3], offsets[3], offset)
    offset = gl.where(i < ends[2], offsets[2], offset)
    offset = gl.where(i < ends[1], offsets[1], offset)
    offset = gl.where(i < ends[0], offsets[0], offset)
    from_list = gl.load(lists + at + i, mask=listed, other=0)
    return gl.where(listed, from_list, i + offset)


@gluon.jit
def row_coordinates(rows, b, where, CLOSED: gl.constexpr, ENDS: gl.constexpr):
    """Where each row stands, where its sequence starts, and one past its last key, if ENDS are wanted.

    Rows without token stand at -1 and end at 0: no key is theirs.
    """
    q_len, kv_len, offset, start, q_start, q_pos, q_end, _k_pos, _max_distance, _num_dense_rows, _num_last = where
    if CLOSED:
        return rows + offset, gl.full_like(rows, 0) + start, gl.full_like(rows, 0) + kv_len
    else:
        inside = rows < q_len
        at = b * q_len + rows
        pos = gl.load(q_pos + at, mask=inside, other=-1)
        first = gl.load(q_start + at, mask=inside, other=0)
        end = pos
        if ENDS:
            end = gl.load(q_end + at, mask=inside, other=0)
        return pos, first, end


@gluon.jit
def key_coordinates(slots, b, where, HAS_K_POS: gl.constexpr):
    """Coordinates of key slots; slots past the keys get -1, which lies before every sequence."""
    _q_len, kv_len, _offset, _start, _q_start, _q_pos, _q_end, k_pos, _max_distance, _num_dense_rows, _num_last = where
    if HAS_K_POS:
        return gl.load(k_pos + b * kv_len + slots, mask=slots < kv_len, other=-1)
    else:
        return slots


@gluon.jit
def mask_block(
    s, rows, slots, row0, key0, num_rows: gl.constexpr, num_keys: gl.constexpr, b, where, window, sinks,
    ROW_AXIS: gl.constexpr, SIMPLE: gl.constexpr, CLOSED: gl.constexpr, CAUSAL: gl.constexpr, HAS_K_POS: gl.constexpr,
    LAST: gl.constexpr,
):  # fmt: skip
    """Scores of a partial block with -1e30 where a row may not read a key.

    `rows` and `slots` number the tile's rows and keys along their axes, from row0 and key0. SIMPLE stands for causal
    rows in closed form that all have their own key and none of which is dense by itself. Then a block past the sinks
    needs one comparison per score, and one before the windows of all rows one per key: a window of a few blocks spends
    its time on masks.
    """
    _q_len, kv_len, offset, start, _q_start, _q_pos, _q_end, _k_pos, max_distance, num_dense_rows, num_last = where
    keys_axis: gl.constexpr = 1 - ROW_AXIS
    slots_2d = gl.expand_dims(slots, ROW_AXIS)
    if SIMPLE:
        sink_end = start + sinks
        near = gl.minimum(window, max_distance)
        last = gl.expand_dims(rows, keys_axis) + offset
        if (key0 + num_keys <= row0 + offset - window + 1) & (row0 + num_rows + offset - key0 <= max_distance):
            s = gl.where(slots_2d < sink_end, s, -1.0e30)
        elif key0 >= sink_end:
            if ROW_AXIS == 1:
                # As unsigned numbers, keys after the row are far away. Limits of so many rows would spill.
                s = gl.where((last - slots_2d).to(gl.uint32) < near.to(gl.uint32), s, -1.0e30)
            else:
                s = gl.where((slots_2d > last - near) & (slots_2d <= last), s, -1.0e30)
        else:
            s = gl.where((slots_2d < sink_end) | (slots_2d > last - near), s, -1.0e30)
            s = gl.where((slots_2d > last - max_distance) & (slots_2d <= last), s, -1.0e30)
    else:
        pos_1d, first_1d, end_1d = row_coordinates(rows, b, where, CLOSED, LAST or not CAUSAL)
        pos = gl.expand_dims(pos_1d, keys_axis)
        first = gl.expand_dims(first_1d, keys_axis)
        keys = gl.expand_dims(key_coordinates(slots, b, where, HAS_K_POS), ROW_AXIS)
        # One condition after the other: together their predicates would spill.
        far = gl.where(pos - first < num_dense_rows, max_distance, gl.abs(window))
        if LAST:  # a negative window has dense last rows
            far = gl.where((window < 0) & (pos >= gl.expand_dims(end_1d, keys_axis) - num_last), max_distance, far)
        sink = keys < first + sinks
        s = gl.where((pos - keys < far) | sink, s, -1.0e30)
        s = gl.where((keys >= first) & (pos - keys < max_distance), s, -1.0e30)
        if CAUSAL:
            s = gl.where((keys <= pos) & (slots_2d < kv_len), s, -1.0e30)
        else:
            end = gl.expand_dims(end_1d, keys_axis)
            s = gl.where((keys - pos < window) | sink, s, -1.0e30)
            s = gl.where((keys < end) & (keys - pos < max_distance), s, -1.0e30)
    return s
