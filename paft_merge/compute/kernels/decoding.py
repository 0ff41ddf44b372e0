"""Values of codes with scales: a table gives the value of each byte, and each block of a row has a scale and perhaps a zero point."""

from __future__ import annotations

from typing import Any

from paft_merge.compute.kernels.block_source import STRIP, TURNED
from paft_merge.compute.kernels.primitives import jit


@jit
def decode(codes: Any, table: Any, scales: Any, zeros: Any, width: int, size: int, skip: int, out: Any) -> None:
    """Write `(value of the code - zero point) * scale` for entries that follow each other in rows of `width`.

    Args:
        codes: `[ceil(E / P)]` bytes of P codes each.
        table: `[256, P]` float32, the values of each byte; P is 1 or 2.
        scales: `[rows, blocks]` float32, from the row of the first entry on.
        zeros: of the same shape; `[0, 0]` where there are none.
        width: entries of a row of the weight.
        size: entries of a block of a row; the last block may be cut.
        skip: entries before the first one in the rows of `scales`.
        out: `[E]` float32, overwritten.
    """
    row, column = skip // width, skip % width
    for start in range(0, out.size, STRIP):
        strip = out[start : start + STRIP]
        count = strip.size
        if table.shape[1] == 1:
            held = codes[start : start + count]
            for j in range(count):
                strip[j] = table[held[j], 0]
        else:
            held = codes[start // 2 : (start + count + 1) // 2]
            for j in range(count // 2):
                byte = held[j]
                strip[2 * j], strip[2 * j + 1] = table[byte, 0], table[byte, 1]
            if count % 2:
                strip[count - 1] = table[held[count // 2], 0]
        done = 0
        while done < count:
            block = column // size
            many = min(min((block + 1) * size, width) - column, count - done)
            part, scale = strip[done : done + many], scales[row, block]
            if zeros.size:
                zero = zeros[row, block]
                for j in range(many):
                    part[j] = (part[j] - zero) * scale
            else:
                for j in range(many):
                    part[j] *= scale
            done += many
            column += many
            if column == width:
                row, column = row + 1, 0


@jit
def decode_turned(codes: Any, table: Any, scales: Any, size: int, line: Any, out: Any) -> None:
    """Write `value of the code * scale` for rows whose codes are stored in columns, two to a byte.

    Args:
        codes: `[W, B]` bytes; of each row, the codes of a column of `out`, and bytes that are not used.
        table: `[256, 2]` float32, the values of each byte.
        scales: `[W, G]` float32; G blocks cover the rows of `out`.
        size: rows of a block, even.
        line: `[TURNED]` float32, memory.
        out: `[N, W]` float32, N even; overwritten.
    """
    rows, width = out.shape
    for first in range(0, width, TURNED):
        many = min(TURNED, width - first)
        for row in range(0, rows, 2):
            if row % size == 0:
                for j in range(many):
                    line[j] = scales[first + j, row // size]
            upper, lower = out[row, first : first + many], out[row + 1, first : first + many]
            for j in range(many):
                byte = codes[first + j, row // 2]
                upper[j] = table[byte, 0] * line[j]
                lower[j] = table[byte, 1] * line[j]
