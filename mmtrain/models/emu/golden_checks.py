"""Every quantity of a golden folder, one comparison each.

Limits are the folder's own advice (its README, section "Tolerances"): float32 noise of the
reference is up to ten times smaller, and each known wrong variant is far outside.

B rows   L padded length   T packed rows   P regression pairs
"""

import math
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from mmtrain.data.batch import Targets
from mmtrain.encoders.causal_transformer import CausalTransformer
from mmtrain.models.emu.generate import EmuSampler
from mmtrain.models.emu.golden import (
    Comparison,
    Golden,
    PackedRows,
    compare,
    load_release,
    pack_rows,
    padded,
    prompts_of,
)
from mmtrain.models.emu.golden_storyboards import storyboards
from mmtrain.models.emu.model import EmuHead, parameters
from mmtrain.models.emu.names import RELEASE, with_peft
from mmtrain.models.writing import Prompt
from mmtrain.nn.choice import Beams
from mmtrain.nn.flow import Flow
from mmtrain.nn.lora import merged
from mmtrain.nn.objectives import TokenCrossEntropy, weighted_losses

FEATURES, STATES, LOGITS, MEANS = 1e-6, 1e-5, 2e-5, 2e-6
GRADIENTS = 1e-5  # of the largest magnitude in the tensor; of the norm
ROLLOUT = 1e-4  # errors are fed back once a visual row
MARGIN = 2 * LOGITS  # a difference of two logits
INSTRUCT, INSTRUCT_GRADIENTS, MERGED = 5e-5, 3e-5, 1e-6


def every_check(golden: Golden) -> Iterator[Comparison]:
    """All comparisons of a folder, in the order of the way through the model."""
    yield from forward(golden)
    yield from generation(golden)
    yield from instruct(golden)
    yield from storyboards(golden.folder)


def forward(golden: Golden) -> Iterator[Comparison]:
    """Images, every intermediate of the fold, losses, gradients and their norms."""
    model, batch, form = golden.pretrained(), golden.batch, golden.form()
    mean, std = (torch.tensor(x, dtype=torch.float64) for x in (form.image_mean, form.image_std))
    scaled = ((batch["in.pixels_uint8"].double() / 255 - mean) / std).permute(0, 3, 1, 2)
    yield compare("in.images", scaled.float(), batch["in.images"], FEATURES)
    rows = pack_rows(batch["in.input_ids"], batch["in.attention_mask"], batch["in.images"], form)
    yield compare("out.labels", rows.labels_BL, batch["out.labels"], 0)
    for name, mask in (("source", rows.source_BL), ("target", rows.target_BL)):
        quantity = f"out.regress_{name}_mask"
        yield compare(quantity, mask.to(torch.uint8), batch[quantity], 0)
    flows = fold(model, rows.flow)
    yield from _intermediates(model, flows, rows, batch)
    yield from _losses(model, flows["embed"], list(flows.values())[-1], rows, golden)


def fold(model: Mapping[str, nn.Module], flow: Flow) -> dict[str, Flow]:
    """What each layer but the head hands on, by its name."""
    flows = {}
    for name, layer in model.items():
        if name != "head":
            flow = flows[name] = layer(flow)
    return flows


def _intermediates(
    model: Mapping[str, nn.Module],
    flows: Mapping[str, Flow],
    rows: PackedRows,
    batch: Mapping[str, Tensor],
) -> Iterator[Comparison]:
    tower = [name for name in flows if name.startswith("vision.")][-1]
    normed: list[Tensor] = []
    causal = cast(CausalTransformer, model["causal"])
    hook = causal.norm.register_forward_hook(lambda _, inputs, out: normed.append(out))
    causal(flows["vision_norm"])
    hook.remove()
    for quantity, ours, limit in (
        ("out.visual_features", flows[tower].hidden, FEATURES),
        ("out.ln_visual", flows["vision_norm"].hidden, STATES),
        ("out.cformer_hidden", normed[0], STATES),
        ("out.image_embeds", flows["causal"].hidden, STATES),
    ):
        yield compare(quantity, ours, batch[quantity], limit)
    spliced = batch["out.inputs_embeds"][rows.real_BL]
    yield compare("out.inputs_embeds", flows["embed"].hidden, spliced, STATES)


def _losses(
    model: Mapping[str, nn.Module], embedded: Flow, flow: Flow, rows: PackedRows, golden: Golden
) -> Iterator[Comparison]:
    batch, head = golden.batch, cast(EmuHead, model["head"])
    assert embedded.carried is not None
    hidden_TD = head.norm(flow.hidden)
    pairs = flow.fields["source"]
    yield compare("out.hidden", hidden_TD, batch["out.hidden"][rows.real_BL], STATES)
    logits = batch["out.logits"][rows.real_BL]
    yield compare("out.logits", head.logits(flow.hidden), logits, LOGITS)
    predicted = head.regressed(flow.hidden)[pairs]
    yield compare("out.regress_pred", predicted, batch["out.regress_pred"], STATES)
    yield compare("out.regress_target", embedded.carried, batch["out.regress_target"], STATES)
    values = head(flow)
    recorded_ce = nn.functional.pad(batch["out.token_ce"], (0, 1))[rows.real_BL]
    yield compare("out.token_ce", values["text"], recorded_ce, STATES)
    counted = (flow.fields["labels"] >= 0).float()
    weights = {"text": counted / counted.sum(), "image": torch.full(pairs.shape, 1 / len(pairs))}
    origins = {name: torch.zeros(len(w), dtype=torch.int64) for name, w in weights.items()}
    total, parts = weighted_losses(values, Targets(weights, origins), {"text": 1.0, "image": 1.0})
    yield compare("out.ce_mean", parts["text"], batch["out.ce_mean"], MEANS)
    yield compare("out.regress_mse", parts["image"], batch["out.regress_mse"], MEANS)
    yield compare("out.total_loss", total, batch["out.total_loss"], MEANS)
    yield from _gradients(model, total, batch)
    norms = golden.gradient_norms["pretrain"]
    for key, loss in (("ce", parts["text"]), ("mse", parts["image"]), ("total", total)):
        yield _gradient_norms(model, key, loss, norms)


def released_gradients(model: Mapping[str, nn.Module], loss: Tensor) -> dict[str, Tensor | None]:
    """Gradients under released names; None for a tensor the loss does not reach."""
    named = parameters(model)
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    ours = dict(zip(named, found, strict=True))
    dense = {
        name: p.new_zeros(p.shape) if ours[name] is None else ours[name]
        for name, p in named.items()
    }
    out: dict[str, Tensor | None] = dict(RELEASE.to_foreign(dense))
    for name, gradient in ours.items():
        if gradient is None:
            out[cast(str, RELEASE.foreign_name(name))] = None
    return out


def _gradients(
    model: Mapping[str, nn.Module], total: Tensor, batch: Mapping[str, Tensor]
) -> Iterator[Comparison]:
    ours = released_gradients(model, total)
    for quantity, recorded in batch.items():
        if quantity.startswith("grad."):
            gradient = ours.get(quantity.removeprefix("grad."))
            gradient = recorded.new_full((), math.nan) if gradient is None else gradient
            largest = float(recorded.abs().max()) or 1.0
            yield compare(quantity, gradient / largest, recorded / largest, GRADIENTS)


def _gradient_norms(
    model: Mapping[str, nn.Module],
    key: str,
    loss: Tensor,
    recorded: Mapping[str, Mapping[str, float]],
) -> Comparison:
    """Largest relative error over all tensors; a gradient only one side has is infinitely wrong."""
    gradients = released_gradients(model, loss)
    ours = {name: None if g is None else float(g.double().norm()) for name, g in gradients.items()}
    ours["__global__"] = math.sqrt(sum(norm**2 for norm in ours.values() if norm is not None))
    worst, where = 0.0, ""
    for name, norms in recorded.items():
        error = _relative(ours.get(name), norms[key])
        if error >= worst:
            worst, where = error, name
    return Comparison(f"grad_norms.{key} ({len(recorded)}, worst {where})", worst, GRADIENTS)


def _relative(ours: float | None, recorded: float | None) -> float:
    if ours is None or recorded is None:
        return 0.0 if ours is recorded else math.inf
    return abs(ours - recorded) / (abs(recorded) or 1.0)


def generation(golden: Golden) -> Iterator[Comparison]:
    """Visual rollouts, written text, ranking."""
    sampler, recorded = EmuSampler(golden.pretrained(), golden.form()), golden.generation
    for case in ("text_prompt", "image_prompt", "cfg_pair"):
        latents = sampler.rollout(prompts_of(golden, recorded, f"rollout.{case}"))
        quantity = f"rollout.{case}.latents"
        yield compare(quantity, latents, recorded[quantity], ROLLOUT)
    batch = prompts_of(golden, recorded, "textgen.batch")
    with torch.inference_mode():
        first = sampler.head.logits(sampler.start(batch, 1)[1])
    quantity = "textgen.batch.first_logits"
    yield compare(quantity, first, recorded[quantity], LOGITS)
    yield from _greedy(golden, sampler, recorded, "textgen.batch")
    yield from _greedy(golden, sampler, recorded, "textgen.single")
    yield from _beams(golden, sampler)
    yield from _ranks(golden, sampler)


def _greedy(
    golden: Golden, sampler: EmuSampler, tensors: Mapping[str, Tensor], prefix: str
) -> Iterator[Comparison]:
    """Ids, and by how much each won (on the recorded path, so a lost tie shows once)."""
    prompts, expected = prompts_of(golden, tensors, prefix), tensors[f"{prefix}.greedy_ids"]
    form, length = golden.form(), expected.shape[1]
    written = padded(sampler.text(prompts, length), length, form.pad)
    yield compare(f"{prefix}.greedy_ids", written, expected, 0)
    margins = torch.zeros(expected.shape)
    for row, (prompt, ids) in enumerate(zip(prompts, expected.tolist(), strict=True)):
        new = [token for token in ids if token != form.pad]
        whole = Prompt((*prompt.tokens, *new), prompt.pixels)
        with torch.inference_mode():
            hidden_TD = sampler.hidden(sampler.pack([whole]))[len(prompt.tokens) - 1 : -1]
            best = sampler.head.logits(hidden_TD).topk(2).values
        margins[row, : len(new)] = best[:, 0] - best[:, 1]
    recorded = tensors[f"{prefix}.greedy_margin"]
    yield compare(f"{prefix}.greedy_margin", margins.reshape(recorded.shape), recorded, MARGIN)


def _beams(golden: Golden, sampler: EmuSampler) -> Iterator[Comparison]:
    recorded, form = golden.generation, golden.form()
    prompts = prompts_of(golden, recorded, "textgen.beam")
    for name, options in {
        "beam5_ids": Beams(new_tokens=16),
        "beam5_lp1_ids": Beams(new_tokens=16, length_penalty=1.0),
        "beam5_caption_ids": Beams(new_tokens=20, length_penalty=-1.0, minimum_length=8),
    }.items():
        expected = recorded[f"textgen.beam.{name}"]
        written = [sampler.beam(prompt, options) for prompt in prompts]
        length = max(expected.shape[1], *map(len, written))
        wide = nn.functional.pad(expected, (0, length - expected.shape[1]), value=form.pad)
        yield compare(f"textgen.beam.{name}", padded(written, length, form.pad), wide, 0)


def _ranks(golden: Golden, sampler: EmuSampler) -> Iterator[Comparison]:
    """Scores are summed NLL over the number of all shifted positions."""
    recorded, form = golden.generation, golden.form()
    (prompt,) = prompts_of(golden, recorded, "rank")
    lengths = recorded["rank.candidate_mask"].sum(1)
    ids = recorded["rank.candidate_ids"].tolist()
    candidates = [row[:n] for row, n in zip(ids, lengths.tolist(), strict=True)]
    assert all(form.pad not in row for row in candidates)
    summed = sampler.negative_log_likelihoods(prompt, candidates)
    for name, counted in (("each_alone", lengths), ("padded_together", lengths.max())):
        scores = summed / (len(prompt.tokens) + counted - 1)
        yield compare(f"rank.loss_{name}", scores, recorded[f"rank.loss_{name}"], MEANS)
        yield compare(f"rank.order_{name}", scores.argsort(), recorded[f"rank.order_{name}"], 0)


def instruct(golden: Golden) -> Iterator[Comparison]:
    """The instruct model: adapters as modules beside their weights, and merged into them."""
    recorded, form = golden.instruct, golden.form()
    model = golden.instructed()
    sampler, head = EmuSampler(model, form), cast(EmuHead, model["head"])
    pixels = golden.batch["in.images"][recorded["in.image_index"]]
    rows = pack_rows(recorded["in.input_ids"], recorded["in.attention_mask"], pixels, form)
    flows = fold(model, rows.flow)
    hidden_TD, real = flows[list(flows)[-1]].hidden, rows.real_BL
    spliced = recorded["out.inputs_embeds"][real]
    yield compare("instruct out.inputs_embeds", flows["embed"].hidden, spliced, STATES)
    yield compare(
        "instruct out.hidden", head.norm(hidden_TD), recorded["out.hidden"][real], INSTRUCT
    )
    logits_TV = head.logits(hidden_TD)
    yield compare("instruct out.logits", logits_TV, recorded["out.logits"][real], INSTRUCT)
    yield from _answers(golden, model, rows, logits_TV)
    for found in _greedy(golden, sampler, recorded, "textgen"):
        yield Comparison(f"instruct {found.quantity}", found.error, found.limit)
    yield from _merged(golden, model, rows)


def _merged(
    golden: Golden, model: Mapping[str, nn.Module], rows: PackedRows
) -> Iterator[Comparison]:
    """Weights with adapters folded in, and a plain model with them."""
    recorded = golden.instruct
    whole = RELEASE.to_foreign(merged(dict(parameters(model)), golden.adapters.scale))
    for quantity, weight in recorded.items():
        if quantity.startswith("merged."):
            ours = whole["decoder.lm." + quantity.removeprefix("merged.")]
            yield compare(quantity, ours, weight, MERGED)
    plain = load_release(golden.config(golden.description["instruct"]["vocab_size"]), whole)
    hidden_TD = list(fold(plain, rows.flow).values())[-1].hidden
    logits_TV = cast(EmuHead, plain["head"]).logits(hidden_TD)
    quantity = "out.merged_logits"
    yield compare(f"instruct {quantity}", logits_TV, recorded[quantity][rows.real_BL], INSTRUCT)


def _answers(
    golden: Golden, model: Mapping[str, nn.Module], rows: PackedRows, logits_TV: Tensor
) -> Iterator[Comparison]:
    recorded = golden.instruct
    ids_BL, real_BL = recorded["in.input_ids"], rows.real_BL
    shifted = torch.where(real_BL, ids_BL, -100)[:, 1:]
    labels_T = nn.functional.pad(shifted, (0, 1), value=-100)[real_BL]
    loss_T = TokenCrossEntropy()(logits_TV, labels_T)
    nll = nn.functional.pad(recorded["out.token_nll"], (0, 1))[real_BL]
    yield compare("instruct out.token_nll", loss_T, nll, INSTRUCT)
    answer_T = nn.functional.pad(recorded["in.answer_mask"][:, 1:], (0, 1))[real_BL]
    mean = (loss_T * answer_T).sum() / answer_T.sum()
    yield compare("instruct out.answer_ce_mean", mean, recorded["out.answer_ce_mean"], INSTRUCT)
    yield from _adapters(golden, released_gradients(model, mean))


def _adapters(golden: Golden, found: Mapping[str, Tensor | None]) -> Iterator[Comparison]:
    """Gradients of A and B, under the names of the wrapped release."""
    gradients = {with_peft(name): gradient for name, gradient in found.items()}
    for quantity, recorded in golden.instruct.items():
        if quantity.startswith("grad."):
            ours = gradients.get(quantity.removeprefix("grad."))
            ours = recorded.new_full((), math.nan) if ours is None else ours
            yield compare(f"instruct {quantity}", ours, recorded, INSTRUCT_GRADIENTS)
    norms: Mapping[str, float] = golden.gradient_norms["instruct_lora"]
    lengths = {
        name: None if g is None else float(g.double().norm()) for name, g in gradients.items()
    }
    errors = [_relative(lengths.get(name), norm) for name, norm in norms.items()]
    yield Comparison(f"grad_norms.instruct_lora ({len(norms)})", max(errors), GRADIENTS)
