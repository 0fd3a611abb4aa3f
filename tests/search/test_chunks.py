"""How verdicts are counted."""

from cactus_ray.search.chunks import counts


def test_counts_add_up() -> None:
    rows = [[i, 0, v, v != "FALSIFIED", None, "x", 0.0] for i, v in enumerate(["CERTIFIED", "UNKNOWN", "FALSIFIED"])]
    assert counts(rows) == {
        "samples": 3, "standard_accuracy": 2 / 3, "n_certified": 1, "n_falsified": 1, "n_unknown": 1,
        "certified_accuracy": 1 / 3,
    }  # fmt: skip
