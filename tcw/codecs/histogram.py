"""Count symbols, in one pass over a tensor, for each unit of work apart."""

import numpy as np

from tcw.codecs.compiled import kernel, prefetch

AHEAD = 1024  # words; a line is asked for so far before it is counted


@kernel
def count_units(words, shift, mask, units, first, last, counts):  # type: ignore[no-untyped-def]
    """counts[u, s] += occurrences of s = (word >> shift) & mask in words[units[u, 2]:units[u, 3]], u in first..last.

    Four tables take turns, so that a run of equal symbols does not wait for its own last increment. Everything is
    unsigned: a signed index would be checked for being negative.
    """
    tables = np.zeros((4, mask + 1), dtype=np.uint32)
    t0, t1, t2, t3 = tables[0], tables[1], tables[2], tables[3]
    down, keep, one = np.uint32(shift), np.uint64(mask), np.uint32(1)
    for u in range(first, last):
        v = words[units[u, 2] : units[u, 3]]
        tables[:] = 0
        quads = v.size // 4
        for q in range(quads):
            if q & 7 == 0:
                prefetch(v, (4 * q + AHEAD) * v.itemsize)
            t0[np.uint64(np.uint32(v[4 * q]) >> down) & keep] += one
            t1[np.uint64(np.uint32(v[4 * q + 1]) >> down) & keep] += one
            t2[np.uint64(np.uint32(v[4 * q + 2]) >> down) & keep] += one
            t3[np.uint64(np.uint32(v[4 * q + 3]) >> down) & keep] += one
        for i in range(4 * quads, v.size):
            t0[np.uint64(np.uint32(v[i]) >> down) & keep] += one
        row = counts[u]
        for s in range(mask + 1):
            row[s] += t0[s] + t1[s] + t2[s] + t3[s]
