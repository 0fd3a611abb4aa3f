"""Samples of the selection split that a search did not use, on which its front is verified once more.

The best of many points was chosen by its figure, so that figure is too good (the winner's curse; Cawley and Talbot
2010). The same network on samples that had no part in the choice has a figure without that bias.
"""

from __future__ import annotations

from cactus_ray.data import subset
from cactus_ray.data.splits import generator
from cactus_ray.search.space import Space
from cactus_ray.training.evaluate import evenly_spaced

SPLIT = "selection-fresh"


def fresh_samples(space: Space, total: int) -> tuple[list[int], str | None]:
    """Indices into the selection split of ``total`` samples, sorted; and why there are none, where some were wanted.

    ``search.fresh_samples`` of them, by default as many as the search verifies on, or what is left if that is less.
    Used are the samples that trials are verified on and, where their scores decide something (the epoch that is kept,
    or who is stopped early), the images that are scored during training. Deterministic.
    """
    wanted = space.search.fresh_samples
    if wanted == 0:
        return [], None
    count = total if space.samples == "selection" else min(int(space.samples), total)
    used = set(subset(total, count).tolist())
    train = space.base["train"]
    searched = {p.name for p in space.parameters}
    decisive = train["keep"] != "last" or "train.keep" in searched or space.search.scheduler.name != "none"
    if decisive:
        some = "train.proxy_samples" in searched
        used |= set(range(total) if some else evenly_spaced(total, int(train["proxy_samples"])).tolist())
    # subsets are the beginnings of one order, so a study with more samples takes these first
    order = [i for i in generator(0).permutation(total).tolist() if i not in used]
    chosen = order[: count if wanted is None else wanted]
    if chosen:
        return sorted(chosen), None
    whole = {"verification.samples": count, "train.proxy_samples": int(train["proxy_samples"]) if decisive else 0}
    blame = [key for key, samples in whole.items() if samples >= total] or list(whole)
    scored = f" or were scored during training (train.proxy_samples: {train['proxy_samples']})" if decisive else ""
    return [], (
        f"no fresh samples: all {total} of the selection split were verified on{scored}, so the front could not be "
        f"seen again on others; less than {total} as {' and '.join(blame)} leaves some"
    )
