"""Trains the judges on rendered scenes: `python -m apt_hooks.tinyworld.train_judges --out DIR`.

Writes the weights of both networks and `judges.json`, their card. The numbered concepts are never shown in training.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import errors_in_one_line
from .concepts import CONCEPTS
from .datasets import draw_scenes, held_out_scenes, random_subject
from .fit import cached
from .judge_networks import (
    AttributeClassifier,
    IdentityEncoder,
    Judges,
    attribute_labels,
    identity_score,
    load_judges,
    read_attributes,
    save_judges,
    text_score,
)
from .metrics import auc
from .personalize import reference_pictures
from .pretrain import render_all
from .render import render
from .world import COLORS, KINDS, PARTS, PATTERNS, Scene, Subject, random_scene

BATCH = 64
CLASSIFIER_SCENES = 16_000
FAMILIES, MEMBERS, RENDERS = 200, 4, 4
"""The identity encoder's data: families for each kind, subjects in a family, pictures of a subject."""
TEMPERATURE = 0.1
HELD_OUT_SEED = 900_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the weights and judges.json")
    parser.add_argument("--steps", type=int, default=1500, help=f"of each network, {BATCH} pictures each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder where rendered pictures are kept for the next run")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    judges = Judges(AttributeClassifier(), IdentityEncoder())
    card: dict[str, Any] = {
        "data": {
            "classifier": f"{CLASSIFIER_SCENES} scenes, half of them with a patterned subject",
            "identity": f"{len(KINDS) * FAMILIES * MEMBERS} subjects, {RENDERS} pictures each",
        },
        "seed": args.seed,
        "torch": torch.__version__,
        "classifier": _train_classifier(judges.classifier, args),
        "identity": _train_identity(judges.identity, args),
    }
    save_judges(judges, args.out)
    # What is reported is of the weights as stored, in half precision.
    judges = load_judges(args.out)
    card["held_out"] = evaluate_classifier(judges.classifier, args.seed + HELD_OUT_SEED)
    card["concepts"] = evaluate_identity(judges, args.seed + HELD_OUT_SEED)
    (args.out / "judges.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"held_out": card["held_out"], "mean_auc": card["concepts"]["mean_auc"]}, indent=1))


# The classifier.


def _train_classifier(classifier: AttributeClassifier, args: argparse.Namespace) -> dict[str, Any]:
    scenes = draw_scenes(CLASSIFIER_SCENES, args.seed + 11, subjects=True)
    pictures = _rendered(scenes, args.seed + 11, args.work)
    labels = attribute_labels(scenes)
    # A patterned body has two colors: no answer is asked for.
    labels["color"][torch.tensor([scene.subject.pattern is not None for scene in scenes])] = -100

    def loss(g: torch.Generator) -> Tensor:
        rows = torch.randint(len(scenes), (BATCH,), generator=g)
        logits = classifier(_as_decoded(pictures[rows], g))
        return torch.stack([F.cross_entropy(logits[name], labels[name][rows]) for name in logits]).sum()

    return _train("classifier", classifier, loss, args)


def evaluate_classifier(classifier: AttributeClassifier, seed: int, count: int = 2000) -> dict[str, Any]:
    """Accuracies per attribute on scenes that training never saw.

    Args:
        classifier: to evaluate.
        seed: of the scenes and their pictures.
        count: of scenes as `held_out_scenes` draws them, half of them patterned.
    """
    scenes = held_out_scenes(count, seed, subjects=True)
    read, shown = read_attributes(classifier, _as_float(render_all(scenes, seed))), attribute_labels(scenes)
    plain = torch.tensor([scene.subject.pattern is None for scene in scenes])
    right = {name: read[name] == shown[name] for name in read}
    right["color"] = right["color"][plain]
    return {
        "scenes": count,
        "plain": int(plain.sum()),
        "seed": seed,
        "accuracy": {name: round(value.double().mean().item(), 4) for name, value in right.items()},
    }


# The identity encoder.


def _train_identity(encoder: IdentityEncoder, args: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(args.seed + 12)
    subjects = [s for kind in KINDS for _ in range(FAMILIES) for s in _family(kind, rng)]
    pictures = _rendered([random_scene(rng, s) for s in subjects for _ in range(RENDERS)], args.seed + 12, args.work)
    numbers = {subject: number for number, subject in enumerate(dict.fromkeys(subjects))}
    labels = torch.tensor([numbers[subject] for subject in subjects])
    kinds, families = 2, BATCH // (2 * 2 * MEMBERS)

    def loss(g: torch.Generator) -> Tensor:
        # Few kinds, whole families: most negatives differ from a subject in little.
        kind = torch.randperm(len(KINDS), generator=g)[:kinds, None]
        family = kind * FAMILIES + torch.stack([torch.randperm(FAMILIES, generator=g)[:families] for _ in range(kinds)])
        rows = (family.flatten()[:, None] * MEMBERS + torch.arange(MEMBERS)).flatten()
        views = torch.stack([torch.randperm(RENDERS, generator=g)[:2] for _ in rows])
        images = pictures[(rows[:, None] * RENDERS + views).flatten()]
        return contrastive_loss(encoder(_as_decoded(images, g)), labels[rows].repeat_interleave(2))

    return _train("identity", encoder, loss, args)


def contrastive_loss(embeddings: Tensor, labels: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """The mean over pairs of one subject of -log softmax(z_i z_j / temperature), the softmax over all j but i.

    Args:
        embeddings: z, of unit length, [n, d].
        labels: the subject's number, [n]; each occurs at least twice.
        temperature: above 0.

    Source: Khosla et al. 2020, arXiv 2004.11362, eq. 2.
    """
    own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    logits = (embeddings @ embeddings.T / temperature).masked_fill(own, -torch.inf)
    same = (labels[:, None] == labels[None]) & ~own
    log_share = logits.log_softmax(1).masked_fill(~same, 0.0)
    return -(log_share.sum(1) / same.sum(1)).mean()


def _family(kind: str, rng: random.Random) -> list[Subject]:
    """`MEMBERS` subjects that are easily taken for one another; none is a numbered concept."""
    numbered = [concept.subject for concept in CONCEPTS]
    base = numbered[0]
    while base in numbered:
        base = dataclasses.replace(random_subject(rng), kind=kind)
    family = [base, Subject(kind, rng.choice((base.color, base.second_color, *COLORS)))]
    variants = numbered
    while any(variant in numbered for variant in variants):
        variants = [_variant(base, rng) for _ in range(MEMBERS - 2)]
    return family + variants


def _variant(subject: Subject, rng: random.Random) -> Subject:
    """The subject with another color, second color, pattern or part."""
    change = rng.choice(("color", "second_color", "pattern", "parts"))
    if change == "parts":
        kept = rng.sample(subject.parts, len(subject.parts) - 1)
        new = rng.choice([part for part in PARTS if part not in subject.parts])
        return dataclasses.replace(subject, parts=tuple(sorted((*kept, new))))
    if change == "pattern":
        return dataclasses.replace(subject, pattern=rng.choice([p for p in PATTERNS if p != subject.pattern]))
    color = rng.choice([color for color in COLORS if color not in (subject.color, subject.second_color)])
    if change == "color":
        return dataclasses.replace(subject, color=color)
    return dataclasses.replace(subject, second_color=color)


def evaluate_identity(judges: Judges, seed: int, count: int = 100) -> dict[str, Any]:
    """Per concept, how well the identity score tells it from others of its class, scored against its own references.

    Args:
        judges: both; the text score of the concept's pictures is reported too.
        seed: of the scenes and their pictures.
        count: pictures of the concept; as many of plain and of patterned members of its class are the negatives.
    """
    rows = []
    for number, concept in enumerate(track(CONCEPTS, description="concepts")):
        rng = random.Random(seed + number)
        references = reference_pictures(concept, seed + number)
        row: dict[str, Any] = {"concept": number, "kind": concept.subject.kind}
        for name, style in (("photo", "photo"), ("all_styles", None)):
            scenes = [random_scene(rng, subject) for subject in _class_members(concept.subject, count, rng)]
            if style:
                scenes = [dataclasses.replace(scene, style=style) for scene in scenes]
            images = torch.stack([render(scene, rng) for scene in scenes])
            scores = identity_score(judges.identity, images, references)
            own, plain, patterned = scores.split(count)
            row[f"auc_{name}"] = round(auc(own, torch.cat([plain, patterned])), 4)
            row[f"auc_{name}_patterned"] = round(auc(own, patterned), 4)
            row[f"score_{name}"] = [round(part.mean().item(), 3) for part in (own, plain, patterned)]
            row[f"text_{name}"] = round(text_score(judges.classifier, images[:count], scenes[:count]).mean().item(), 4)
        rows.append(row)
    means = {key: round(sum(row[key] for row in rows) / len(rows), 4) for key in rows[0] if key.startswith("auc")}
    negatives = {"plain": count, "patterned": count}
    return {"positives": count, "negatives": negatives, "seed": seed, "mean_auc": means, "each": rows}


def _class_members(subject: Subject, count: int, rng: random.Random) -> list[Subject]:
    """`count` times the subject, as many plain ones of its kind, as many others with a pattern."""
    plain = [Subject(subject.kind, rng.choice(list(COLORS))) for _ in range(count)]
    patterned: list[Subject] = []
    while len(patterned) < count:
        other = dataclasses.replace(random_subject(rng), kind=subject.kind)
        if other != subject:
            patterned.append(other)
    return [subject] * count + plain + patterned


# What both share.


def _rendered(scenes: list[Scene], seed: int, work: Path | None) -> Tensor:
    """All pictures, [count, 3, 64, 64], uint8; with a folder kept there for the next time."""
    if work is None:
        return render_all(scenes, seed)
    work.mkdir(parents=True, exist_ok=True)
    settings = {"scenes": zlib.crc32(repr(scenes).encode()), "seed": seed}
    pictures: Tensor = cached(work / f"judges-{len(scenes)}-{seed}.pt", settings, lambda: render_all(scenes, seed))
    return pictures


def _as_float(pictures: Tensor) -> Tensor:
    return pictures.float() / 255


def _as_decoded(pictures: Tensor, g: torch.Generator) -> Tensor:
    """Pictures somewhat as the autoencoder gives them back: blurred, noisy, colors and place a little off."""
    images = _as_float(pictures)
    n = len(images)

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        return torch.empty(n, channels, 1, 1).uniform_(low, high, generator=g)

    down, right = torch.randint(0, 3, (2,), generator=g).tolist()
    images = F.pad(images, (1, 1, 1, 1), mode="replicate")[..., down : down + 64, right : right + 64]
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    # One in two stays sharp: rendered pictures are judged as well.
    images = torch.lerp(images, blurred, uniform(-1, 1).clamp(min=0))
    images = images * (1 + uniform(-0.06, 0.06, 3)) + uniform(-0.03, 0.03, 3)
    return (images + uniform(0, 0.04) * torch.randn(images.shape, generator=g)).clamp(0, 1)


def _train(
    name: str, module: nn.Module, loss: Callable[[torch.Generator], Tensor], args: argparse.Namespace
) -> dict[str, Any]:
    """Train in place; returns what the card tells of it."""
    peak, warmup = 2e-3, min(100, args.steps)
    optimizer = torch.optim.AdamW(module.parameters(), peak, weight_decay=1e-2)
    g = torch.Generator().manual_seed(args.seed)
    losses: list[dict[str, float]] = []
    total, since = 0.0, time.monotonic()
    every = max(1, args.steps // 10)
    for step in track(range(1, args.steps + 1), description=name):
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, step / warmup) * (0.5 + 0.5 * math.cos(math.pi * step / (args.steps + 1)))
        value = loss(g)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total += value.item()
        if step % every == 0:
            losses.append({"step": step, "loss": round(total / every, 4)})
            total = 0.0
            print(name, losses[-1], f"{time.monotonic() - since:.0f} s", flush=True)
    return {"steps": args.steps, "batch": BATCH, "seconds": round(time.monotonic() - since, 1), "losses": losses}


if __name__ == "__main__":
    with errors_in_one_line():
        main()
