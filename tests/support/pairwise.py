"""Fewer cases than the full product of several factors, with every pair of values of two factors."""

import itertools


def pairwise(*factors):
    """Rows with one value of each factor, the same at every call, that contain each pair of values of two factors.

    Each new row starts from a pair that no row has, and takes of every further factor the value that adds most pairs.
    """
    indices = [range(len(factor)) for factor in factors]
    missing = {
        ((a, i), (b, j))
        for (a, values), (b, others) in itertools.combinations(enumerate(indices), 2)
        for i in values
        for j in others
    }
    rows = []
    while missing:
        row = dict(min(missing))
        for factor, values in enumerate(indices):
            if factor not in row:
                row[factor] = max(values, key=lambda i, f=factor, r=row: (len(_pairs({**r, f: i}) & missing), -i))
        missing -= _pairs(row)
        rows.append(row)
    return [tuple(factor[row[f]] for f, factor in enumerate(factors)) for row in rows]


def _pairs(row):
    return set(itertools.combinations(sorted(row.items()), 2))
