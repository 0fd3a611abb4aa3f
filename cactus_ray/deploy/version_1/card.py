"""``card.md`` of certificates of version 1, frozen. Texts of strangers stand in it as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cactus_ray.deploy.document import Document, FamilySection, Summary
from cactus_ray.deploy.requirements import option, show

ARITHMETIC = {
    "real": "(in real arithmetic; see the limits)",
    "float32": "that the file computes in float32 arithmetic (see the limits)",
}


def render(document: Document) -> str:
    """The model card (Markdown) of a certificate of version 1. Deterministic."""
    return join(
        document, head_part(document, document.network.model), network_part(document, document.network.classes),
        origin_part(document, str),
    )  # fmt: skip


def join(document: Document, head: str, network: str, origin: str) -> str:
    """The card, given those of its parts in which names of the user stand."""
    parts = [head, figures_part(document), threat_part(document), network, running_part(document)]
    if document.family is not None:
        parts.insert(3, family_part(document.family))
    return "\n\n".join([*parts, checking_part(document), limits_part(document), origin]) + "\n"


def head_part(document: Document, model: str) -> str:
    """Title, summary and what was not met; ``model``: how the architecture is shown."""
    network, data = document.network, document.data
    text = (
        f"# {model} at level `{network.level}` for {data.name}\n\n"
        f"A compressed image classifier with {len(network.classes)} classes and a certificate of its robustness: for "
        f"{document.summary.n_certified} of {data.samples} {data.split} images it is proved that no perturbation "
        f"within the threat below changes the predicted class {ARITHMETIC[document.soundness.arithmetic]}."
    )
    if document.provenance.not_met and document.provenance.requirements is not None:
        limits = document.provenance.requirements.limits()
        missed = ", ".join(f"`{option(key)} {show(key, limits[key])}`" for key in document.provenance.not_met)
        text += f"\n\n**Not met on the {data.split} split: {missed}.** The network met it on the selection split."
    return text


def figures_part(document: Document) -> str:
    """The figures as a table, and what they are."""
    columns: list[tuple[str, Summary]] = []
    if document.provenance.selection is not None:
        columns.append(("selection (the choice was made here)", document.provenance.selection))
    summary = document.summary
    columns.append((f"{document.data.split} (after the choice)", summary))
    rows = [
        ("samples", [str(c.samples) for _, c in columns]),
        ("standard accuracy", [_percent(c.standard_accuracy, c.standard_interval) for _, c in columns]),
        ("certified accuracy", [_percent(c.certified_accuracy, c.certified_interval) for _, c in columns]),
        ("at most (all but the falsified)", [f"{c.certified_accuracy_upper:.2%}" for _, c in columns]),
        ("certified / falsified / unknown", [
            f"{c.n_certified} / {c.n_falsified} / {c.n_unknown}" for _, c in columns
        ]),
    ]  # fmt: skip
    table = [f"| | {' | '.join(name for name, _ in columns)} |", f"|---|{'---|' * len(columns)}"]
    table += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows]
    whole = document.data.samples == document.data.total
    extent = (
        f"Every sample of the {document.data.split} split was judged."
        if whole
        else f"**Estimate:** {document.data.samples} of the {document.data.total} samples of the {document.data.split} "
        f"split were judged, a fixed random subset."
    )
    return (
        "## Figures\n\n" + "\n".join(table) + "\n\n"
        f"In brackets: Wilson 95 % intervals. {extent} The share of robust samples lies between "
        f"{summary.certified_accuracy:.2%} (certified) and {summary.certified_accuracy_upper:.2%} (not falsified): for "
        f"{summary.n_unknown} samples neither a proof nor a counterexample was found."
    )


def threat_part(document: Document) -> str:
    """The set of inputs."""
    threat = document.threat
    return (
        "## Threat\n\n"
        f"Any perturbation of at most {threat.epsilon:g} per pixel ({threat.norm} norm), clipped to the domain "
        f"[{threat.domain[0]:g}, {threat.domain[1]:g}]. Other changes of the input (rotation, blur, noise beyond that "
        f"radius, other kinds of images) are not covered."
    )


def family_part(section: FamilySection) -> str:
    """What is proved of the family."""
    summary = section.summary
    return (
        f"## Every rounding to {section.family.format}\n\n"
        f"For {summary.n_certified} of {summary.samples} images ({summary.certified_accuracy:.2%}) the same is proved "
        f"at once of {section.members}. For {summary.n_falsified} images one such network and an input that it "
        f"misclassifies are given (it need not be one that a quantiser makes); {summary.n_unknown} are undecided."
    )


def network_part(document: Document, classes: Sequence[str]) -> str:
    """File, level, input and output; ``classes``: how their names are shown."""
    network, file = document.network, document.file
    size = f"{file.bytes:,} bytes"
    if network.dense_bytes:
        size += (
            f" ({file.bytes / network.dense_bytes:.1%} of the {network.dense_bytes:,} bytes of the same network's "
            "dense float32 file)"
        )
    operations = f"{network.macs:,}" if network.macs is not None else "not counted"
    shape = " x ".join(map(str, network.inputs.shape))
    low, high = document.threat.domain
    lines = [
        f"- File: `{file.name}`, {size}, SHA-256 `{file.sha256}`.",
        f"- Level: `{network.level}`. Multiply-accumulate operations of one image, counted densely: {operations}. "
        "Unstructured zeros save storage, not time.",
        f"- Input: `{network.inputs.name}`, {network.inputs.dtype}, {network.inputs.layout}, N x {shape}, values in "
        f"[{low:g}, {high:g}] (pixels as they are in that range; a normalisation, where the network has one, is inside "
        "of the file).",
        f"- Output: `logits`, N x {len(network.classes)}; the predicted class is the largest. "
        f"Classes: {', '.join(classes)}.",
    ]
    return "## The network\n\n" + "\n".join(lines)


def running_part(document: Document) -> str:
    """Python that runs the file."""
    shape = ", ".join(map(str, document.network.inputs.shape))
    low, high = document.threat.domain
    code = f"""import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{document.file.name}", providers=["CPUExecutionProvider"])
images = np.zeros((1, {shape}), dtype=np.float32)  # yours, in [{low:g}, {high:g}]
(logits,) = session.run(["logits"], {{"{document.network.inputs.name}": images}})
names = session.get_modelmeta().custom_metadata_map["cactus_ray.class_names"]
print(logits.argmax(axis=1), names)"""
    return f"## How to run it\n\n```python\n{code}\n```"


def checking_part(document: Document) -> str:
    """How to check it again."""
    return (
        "## How to check it again\n\n"
        "```\ncactus-ray check .\n```\n\n"
        "recomputes every certified sample on the weights read from the file, replays every counterexample in "
        "onnxruntime, and compares the file, the data and all figures with `certificate.json`, which is what counts; "
        f"this page is for people. Data: {document.data.name}, {document.data.split} split, SHA-256 "
        f"`{document.data.digest}`."
    )


def limits_part(document: Document) -> str:
    """Assumptions and limits, one per line."""
    parity = document.file.parity
    lines = [f"- {text[0].upper()}{text[1:]}." for text in document.soundness.assumptions]
    lines.append(f"- How a sample is decided: {document.soundness.scheme}.")
    if parity is not None:
        lines.append(
            f"- Parity: over {parity.samples} images the logits of onnxruntime differ from our own forward pass by at "
            f"most {parity.max_abs_difference:.2e}; the predicted class differs for {parity.class_disagreements}."
        )
    lines.append("- A certificate is about the listed samples. It promises nothing about any other image.")
    return "## Assumptions and limits\n\n" + "\n".join(lines)


def origin_part(document: Document, shown: Callable[[str], str]) -> str:
    """Provenance, engine and software; ``shown``: how a name or a version is."""
    provenance = document.provenance
    lines = [f"- {key}: {shown(value)}" for key, value in (
        ("study", provenance.study), ("trial", provenance.trial), ("configuration", provenance.config_hash),
        ("commit", provenance.commit),
    ) if value is not None]  # fmt: skip
    if provenance.test_split_uses is not None:
        lines.append(
            f"- this was use {provenance.test_split_uses} of the test split of that "
            f"{'network file' if provenance.trial is None else 'run'}; with every further use its figures say less "
            "about new data"
        )
    settings = ", ".join(f"{key} {value}" for key, value in document.engine.settings.items())
    lines.append(f"- engine: {document.engine.name} {shown(document.engine.version)} ({settings})")
    lines.append("- software: " + ", ".join(f"{name} {shown(version)}" for name, version in document.versions.items()))
    return "## Origin\n\n" + "\n".join(lines)


def _percent(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.2%} [{interval[0]:.2%}, {interval[1]:.2%}]"
