"""detect.py against DAB-DETR, TransVOD Lite and scipy (golden numbers), and its own promises."""
import itertools

import numpy as np
import pytest
import torch
from conftest import golden, recipe

import detect
from detect import MD, SD, assign


def close(ours, theirs, atol=1e-5, rtol=0.0):
    torch.testing.assert_close(ours, theirs.reshape(ours.shape), atol=atol, rtol=rtol)


@pytest.fixture(scope="module")
def tiny():
    """The golden detector: every weight random, ResNet-18, 3 decoder layers."""
    g = golden("dab_detr_tiny.pt")
    sd = SD(classes=7, queries=20, dim=32, heads=4, encoder_layers=2, decoder_layers=3, ffn=64, backbone="resnet18").eval()
    body = {f"backbone.0.body.{k}": v for k, v in recipe(sd.backbone[0].body).items()}
    sd.load_state_dict(g["state_dict"] | body)
    return sd, g, g["images_i8"].float() / 32, g["mask"]


def test_forward_is_dab_detr(tiny):
    sd, g, images, mask = tiny
    with torch.no_grad():
        logits, boxes = sd(images, mask)
        contents, _, memory, position, padding = sd.features(images, mask)
    close(sd.backbone[0](images, mask), g["feature"], 1e-4)
    close(position.permute(0, 3, 1, 2), g["pos_embed"])
    assert torch.equal(padding, g["feature_mask"].flatten(1))
    close(memory, g["memory"])
    with torch.no_grad():
        anchors = sd.refpoint_embed.weight.sigmoid().expand(2, -1, -1)
        close(sd.transformer["decoder"](anchors, memory, position, padding)[1], g["reference_points"])
    close(contents, g["hs"])
    close(logits, g["pred_logits"])
    close(boxes, g["pred_boxes"])


def test_loss_and_gradients_are_dab_detr(tiny):
    sd, g, images, mask = tiny
    count = max(len(v) for v in g["target_labels"])
    labels, targets = torch.full((2, count), -1), torch.zeros(2, count, 4)
    for b in range(2):
        labels[b, :len(g["target_labels"][b])], targets[b, :len(g["target_boxes"][b])] = g["target_labels"][b], g["target_boxes"][b]
    sd.zero_grad()
    loss, terms = detect.detection_loss(*sd(images, mask), labels, targets)
    loss.backward()
    close(loss, g["total_loss"], 0, 1e-5)
    for i, suffix in enumerate(("_0", "_1", "")):
        for ours, theirs in (("class", "ce"), ("l1", "bbox"), ("giou", "giou")):
            close(terms[ours][i], g["losses"][f"loss_{theirs}{suffix}"], 0, 2e-5)
    norms = {name: p.grad.norm() for name, p in sd.named_parameters() if p.grad is not None}
    assert norms.keys() == g["grad_norm"].keys()
    for name, norm in g["grad_norm"].items():
        close(norms[name], torch.as_tensor(norm), 1e-4, 1e-3)
    close(sd.refpoint_embed.weight.grad, g["grad_refpoint_embed"], 1e-4, 1e-3)
    close(sd.transformer["decoder"].ref_anchor_head.layers[-1].weight.grad, g["grad_ref_anchor_head_last"], 1e-4, 1e-3)


def test_a_layer_of_the_position_is_that_of_every_token():
    padding = torch.zeros(2, 5, 7, dtype=torch.bool)
    padding[1, 3:], padding[1, :, 4:] = True, True
    position, layer = detect.sine_image(padding, 16), torch.nn.Linear(16, 16)
    close(detect.linear_of_position(layer, position)[~padding.flatten(1)], layer(position)[~padding], 1e-6)


def test_parts_are_dab_detr():
    g = golden("dab_detr_parts.pt")
    close(detect.sine_image(g["pos_mask"], 256).permute(0, 3, 1, 2), g["pos_embed_256_T20"])
    close(detect.sine_anchor(g["query_ref"], 256), g["query_sine_256"])
    close(detect.inverse_sigmoid(g["inv_sigmoid_in"]), g["inv_sigmoid_out"])
    backbone = detect.Backbone("resnet50").eval()
    backbone.body.load_state_dict(recipe(backbone.body))
    image = g["r50_image_i8"].float() / 32
    with torch.no_grad():
        close(backbone(image, torch.zeros(1, 64, 96, dtype=torch.bool)), g["r50_feature"], 1e-4, 1e-4)


def test_the_paper_preset_has_the_public_parameters():
    sd = SD(classes=91)
    assert sum(p.numel() for p in sd.parameters()) + sum(b.numel() for b in sd.buffers()) > 43_671_517
    assert sum(p.numel() for p in sd.parameters()) == 43_671_517
    state = sd.state_dict()
    assert torch.equal(state["bbox_embed.layers.0.weight"], state["transformer.decoder.bbox_embed.layers.0.weight"])


@pytest.mark.parametrize("case", ["main", "empty", "many"])
def test_loss_is_the_official_one(case):
    g = golden("dab_detr_loss.pt")[case]
    count = max(1, max(len(v) for v in g["target_labels"]))
    labels, targets = torch.full((3, count), -1), torch.zeros(3, count, 4)
    for b in range(3):
        labels[b, :len(g["target_labels"][b])], targets[b, :len(g["target_boxes"][b])] = g["target_labels"][b], g["target_boxes"][b]
    logits, boxes = g["logits"].clone().requires_grad_(), g["boxes"].clone().requires_grad_()
    loss, terms = detect.detection_loss(logits, boxes, labels, targets)
    loss.backward()
    close(loss, g["total"], 0, 1e-5)
    for i, suffix in enumerate(("_0", "_1", "")):
        for ours, theirs in (("class", "ce"), ("l1", "bbox"), ("giou", "giou")):
            close(terms[ours][i], g["losses"][f"loss_{theirs}{suffix}"], 1e-7, 1e-5)
    close(logits.grad, g["grad_logits"], 1e-4)
    close(boxes.grad if boxes.grad is not None else torch.zeros_like(boxes), g["grad_boxes"], 1e-4)


def test_giou_is_the_official_one():
    g = golden("dab_detr_loss.pt")["giou"]
    close(detect.giou(g["boxes1_xyxy"][:, None], g["boxes2_xyxy"][None]), g["giou"])


def test_assignment_is_optimal():
    g = golden("hungarian.npz")
    for i in range(40):
        cost = torch.from_numpy(g[f"cost_{i:02d}"])
        rows, cols = assign(cost)
        assert len(rows) == len(set(rows.tolist())) == len(set(cols.tolist())) == g["n_matched"][i]
        assert rows.tolist() == sorted(rows.tolist())
        np.testing.assert_allclose(cost.double()[rows, cols].sum(), g["optimal_cost"][i], rtol=1e-9)


def test_assignment_against_brute_force():
    draw = np.random.default_rng(0)
    for n, m in itertools.product(range(1, 5), range(1, 6)):
        cost = draw.integers(-3, 4, (n, m)).astype(float)            # small integers: full of ties
        rows, cols = assign(cost)
        wide = cost if n <= m else cost.T
        best = min(sum(wide[r, c] for r, c in enumerate(p)) for p in itertools.permutations(range(wide.shape[1]), wide.shape[0]))
        assert cost[rows, cols].sum() == best
    with pytest.raises(ValueError, match="finite"):
        assign(np.array([[np.nan]]))


def test_seqhqm_is_transvod_lite():
    g = golden("seqhqm_tiny.pt")
    layer = detect.TemporalLayer(32, 4, 64).eval()
    layer.load_state_dict(g["layer"]["state_dict"])
    query = g["layer"]["query"]
    close(layer(query, query), g["layer"]["out_self"])
    close(layer(query, g["layer"]["ref_query"]), g["layer"]["out_cross"])
    s = g["select"]
    logits = s["hs"] @ s["class_embed_weight"].T + s["class_embed_bias"]
    kept, reference = detect.keep_best(logits, int(s["topk"]), s["hs"], s["reference"])
    close(kept, s["hs_out"])
    close(reference, s["reference_out"])
    c = g["chain"]
    hs, reference = c["hs_in"], c["reference_in"]
    for i, k in enumerate(int(k) for k in c["schedule"]):
        logits = hs @ c["selector_heads"][i]["weight"].T + c["selector_heads"][i]["bias"]
        hs, reference = detect.keep_best(logits, k, hs, reference)
        layer.load_state_dict(c["layers"][i])
        hs = layer(hs.reshape(1, -1, 32), hs.reshape(1, -1, 32)).reshape(hs.shape)
        close(hs, c["hs_after"][i].reshape(hs.shape))
        close(reference, c["reference_after"][i].reshape(reference.shape))


def small(classes=5, queries=9, dense=0.5):
    torch.manual_seed(0)
    return SD(classes, queries, 32, 4, 1, 2, 64, "small", dense, dense)


def test_shapes_on_odd_sizes():
    sd = small()
    md = MD(sd, (50, 4, 3))                                             # 50 is capped at the 9 queries
    frames, padding = torch.randn(2, 3, 3, 48, 80), torch.zeros(2, 3, 48, 80, dtype=torch.bool)
    logits, boxes = sd(frames[:, 0], padding[:, 0])
    assert logits.shape == (2, 2, 9, 5) and boxes.shape == (2, 2, 9, 4)
    logits, boxes, one = md(frames, padding, torch.ones(2, 3, dtype=torch.bool))
    assert [tuple(x.shape) for x in logits] == [(2, 3, k, 5) for k in (9, 4, 3)]
    assert [tuple(x.shape) for x in boxes] == [(2, 3, k, 4) for k in (9, 4, 3)]
    assert one.shape == (2, 3, 4)


def excite(model):
    """Random weights everywhere, so that nothing hides behind a zero initialisation."""
    torch.manual_seed(1)
    for p in model.parameters():
        p.data = p.data + 0.05 * torch.randn_like(p)
    return model.eval()


def test_padding_changes_nothing():
    sd = excite(small())
    image = torch.randn(1, 3, 48, 64)
    padded, mask = torch.zeros(2, 3, 80, 96), torch.ones(2, 80, 96, dtype=torch.bool)
    padded[0, :, :48, :64], mask[0, :48, :64] = image[0], False
    padded[1], mask[1] = torch.randn(3, 80, 96), False
    alone = sd(image, torch.zeros(1, 48, 64, dtype=torch.bool))
    together = sd(padded, mask)
    for a, t in zip(alone, together):
        close(t[:, :1], a, 1e-5)


def test_clips_at_once_alone_and_padded_agree():
    md = excite(MD(small(), (6, 4, 2)))
    frames, padding = torch.randn(2, 4, 3, 48, 64), torch.zeros(2, 4, 48, 64, dtype=torch.bool)
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    logits, boxes, one = md(frames, padding, valid)
    first = md(frames[:1], padding[:1], valid[:1])
    short = md(frames[1:, :2], padding[1:, :2], valid[1:, :2])
    close(one[:1], first[2])
    close(one[1:, :2], short[2])
    close(logits[-1][1:, :2], short[0][-1])
    wider, mask = torch.zeros(2, 4, 3, 64, 96), torch.ones(2, 4, 64, 96, dtype=torch.bool)            # padded pixels, too
    wider[..., :48, :64], mask[..., :48, :64] = frames, False
    close(md(wider, mask, valid)[2][valid], one[valid])
    noise = frames.clone()
    noise[1, 2:] = torch.randn_like(noise[1, 2:])
    close(md(noise, padding, valid)[2][1, :2], one[1, :2])


def test_frozen_sd_stays_still_and_the_rest_learns():
    md = MD(small(), (6, 4, 2)).train()
    frames, padding = torch.randn(2, 3, 3, 48, 64), torch.zeros(2, 3, 48, 64, dtype=torch.bool)
    batch = {"frames": frames, "padding": padding, "valid": torch.ones(2, 3, dtype=torch.bool),
             "labels": torch.tensor([[[1], [-1], [2]], [[-1], [-1], [-1]]]), "boxes_cxcywh": torch.full((2, 3, 1, 4), 0.4)}
    before = {k: v.clone() for k, v in md.sd.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in md.parameters() if p.requires_grad], 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        md.loss(batch)[0].backward()
        optimizer.step()
    assert not md.sd.training and all(torch.equal(before[k], v) for k, v in md.sd.state_dict().items())
    assert all(p.grad is not None for p in md.ttm.parameters())


def test_a_batch_without_boxes_and_with_several():
    sd = small()
    batch = {"frames": torch.randn(2, 1, 3, 48, 64), "padding": torch.zeros(2, 1, 48, 64, dtype=torch.bool),
             "valid": torch.ones(2, 1, dtype=torch.bool), "labels": torch.full((2, 1, 1), -1), "boxes_cxcywh": torch.zeros(2, 1, 1, 4)}
    loss, terms = sd.loss(batch)
    loss.backward()
    assert torch.isfinite(loss) and terms["l1"].sum() == 0
    assert all(p.grad is not None for p in sd.parameters() if p.requires_grad)
    batch |= {"labels": torch.tensor([[[0, 1, -1]], [[2, -1, -1]]]), "boxes_cxcywh": torch.rand(2, 1, 3, 4) * 0.3 + 0.2}
    found = detect.match(*sd(batch["frames"][:, 0], batch["padding"][:, 0]), batch["labels"][:, 0], batch["boxes_cxcywh"][:, 0])
    assert ((found >= 0) == (batch["labels"][:, 0] >= 0)).all() and (found[:, 0, 0] != found[:, 0, 1]).all()
    assert torch.isfinite(sd.loss(batch)[0])


def test_pick_takes_the_highest_score():
    logits = torch.tensor([[[-1.0, 0.5], [2.0, -3.0], [0.0, 1.0]]])
    boxes = torch.arange(12.0).reshape(1, 3, 4)
    box, score, category = detect.pick(logits, boxes)
    assert box.tolist() == [[4, 5, 6, 7]] and category.tolist() == [0]
    close(score, torch.tensor([2.0]).sigmoid())


def test_extreme_logits_stay_finite():
    labels, targets = torch.tensor([[0, 1]]), torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]]])
    for value in (1e4, -1e4):
        logits = torch.full((1, 1, 3, 4), value, requires_grad=True)
        loss, _ = detect.detection_loss(logits, torch.rand(1, 1, 3, 4), labels, targets)
        loss.backward()
        assert loss.isfinite() and logits.grad.isfinite().all()


def test_a_clip_of_one_frame_is_the_same_frame_among_absent_ones():
    md = excite(MD(small(), (6, 4, 2)))
    frames, padding = torch.randn(2, 1, 3, 48, 64), torch.zeros(2, 1, 48, 64, dtype=torch.bool)
    alone = md(frames, padding, torch.ones(2, 1, dtype=torch.bool))[2]
    longer = md(frames.repeat(1, 5, 1, 1, 1), padding.repeat(1, 5, 1, 1), torch.tensor([[True] + [False] * 4] * 2))[2]
    close(longer[:, :1], alone)


@pytest.mark.parametrize("name", ["sd", "md"])
def test_detectors_compile_and_export(name):
    sd = excite(small())
    frames, padding = torch.randn(2, 3, 3, 48, 80), torch.zeros(2, 3, 48, 80, dtype=torch.bool)
    model, inputs = (sd, (frames[:, 0], padding[:, 0])) if name == "sd" else (MD(sd, (6, 4, 2)).eval(), (frames, padding, torch.ones(2, 3, dtype=torch.bool)))
    expected = model(*inputs)
    for made in (torch.export.export(model, inputs).module(), torch.compile(model, fullgraph=True, backend="eager")):
        torch.testing.assert_close(made(*inputs), expected)


def test_group_norm_is_exact_in_bf16_too():
    norm, x = detect.GroupNorm(4, 16), 3 + torch.randn(2, 16, 5, 7)
    expected = torch.nn.functional.group_norm(x.bfloat16().float(), 4, norm.weight, norm.bias)
    close(norm(x.bfloat16(), torch.ones(2, 1, 5, 7, dtype=torch.bool)), expected)
