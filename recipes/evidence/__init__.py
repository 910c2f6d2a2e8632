"""The comparisons of docs/evidence.md: which they are, how they are trained, and the page.

    python -m recipes.evidence          # the page, from the results in docs/evidence
    python -m recipes.evidence --train  # the results too, where they are not in runs/evidence yet

Nothing is chosen by what it shows: a comparison in `tasks` is on the page, with all of its
variants.
"""
