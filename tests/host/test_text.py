"""The CLIP that understands placeholders, and its conditionings in ComfyUI's own nodes."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.conditioning.encoding import encode_prompts
from continual_concepts.core.errors import ConceptError

pytestmark = pytest.mark.usefixtures("as_in_comfyui")
LONG = "a photo of <rex> and a cat, " + "in a green meadow with a red ball, " * 6 + "<mimi> at night"


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def carrying(studio):
    """MODEL and CLIP with the bank's words but without its deltas."""
    with torch.inference_mode():
        return studio.aggregate("a dog", studio.bank)[:2]


@pytest.fixture(scope="module")
def backbone(demo):
    from continual_concepts.core.comfy.backbone import ComfyBackbone

    return ComfyBackbone(*demo)


def stock(studio, clip, text):
    """ComfyUI's own CLIP Text Encode node."""
    return studio.stock.CLIPTextEncode().encode(clip, text)[0]


def layers_of(conditioning) -> torch.Tensor:
    """`[1, L, N, D]`."""
    from continual_concepts.core.comfy.apply import context_of

    return context_of(conditioning, 1).hidden


def by_core(backbone, bank, prompt):
    names = bank.vocabulary.parse(prompt).concepts
    return encode_prompts(backbone, bank.vocabulary.parse_all([prompt]),
                          {name: bank[name].tokens for name in names})


def noisy(model) -> torch.Tensor:
    channels = model.get_model_object("latent_format").latent_channels
    return torch.randn(1, channels, 16, 16, generator=torch.Generator().manual_seed(5))


def predictions(model, *conditionings, calls=None, sigma: float = 3.0):
    """Denoised latents of each conditioning at one noise level. calls: receives the UNet's batch sizes."""
    import comfy.samplers

    guider, found = comfy.samplers.CFGGuider(model), []
    guider.inner_set_conds({str(i): conditioning for i, conditioning in enumerate(conditionings)})

    def look(_model, _x, sigmas, extra_args, callback, disable, **_):
        conds, options = list(guider.conds.values()), extra_args["model_options"]
        found.extend(comfy.samplers.calc_cond_batch(guider.inner_model, conds, noisy(model), sigmas[:1],
                                                    options))
        return found[0]

    unet = model.model.diffusion_model
    hook = unet.register_forward_pre_hook(lambda _unet, inputs: None if calls is None
                                          else calls.append(len(inputs[0])))
    try:
        latents = noisy(model)
        guider.sample(latents, torch.zeros_like(latents), comfy.samplers.KSAMPLER(look),
                      torch.tensor([sigma, 0.0]), seed=0)
    finally:
        hook.remove()
    return found


@pytest.mark.parametrize("prompt",
                         ["<rex>", "a photo of <rex> on a beach", "<rex-1> and <mimi> with <blueprint>",
                          "a red car", LONG])
def test_the_stock_node_encodes_what_core_encodes(studio, carrying, backbone, prompt):
    ours, core = layers_of(stock(studio, carrying[1], prompt)), by_core(backbone, studio.bank, prompt).hidden
    assert distance(ours, core.expand_as(ours)) < 1e-5
    assert "<mimi>" not in prompt or ours.shape[1] == studio.bank.layout.copies > 1


def test_one_word_spelled_out_is_the_concept(studio, carrying):
    assert torch.equal(*(layers_of(stock(studio, carrying[1], text))
                         for text in ("<rex>", "<rex-1> <rex-2>")))


@pytest.mark.parametrize("text",
                         ["<rex>, a dog", "(<rex>), a dog", "a <rex>dog", "A dog.<rex>!", "\n<rex>\n",
                          "(<rex> (<mimi>:0.8):1.3)"])
def test_spellings(studio, carrying, text):
    tokens = carrying[1].tokenize(text)["l"]
    words = [token for chunk in tokens for token, *_ in chunk if torch.is_tensor(token)]
    assert len(words) == 2 * text.count("<")


@pytest.mark.parametrize("weight", [1.2, 0.5, 0.0, -1.0])
def test_weights(studio, carrying, weight):
    """ComfyUI moves a weighted token's state between the empty prompt's and its own; so does every layer
    copy."""
    clip = carrying[1]
    plain, empty, weighted = (layers_of(stock(studio, clip, t))
                              for t in ("a <rex> dog", "", f"a (<rex>:{weight}) dog"))
    expected = plain.clone()
    expected[:, :, 2:4] = (plain - empty)[:, :, 2:4] * weight + empty[:, :, 2:4]
    assert distance(weighted, expected) < 1e-5


def test_plain_prompts_are_the_stock_clips(studio, carrying):
    ours, theirs = (stock(studio, clip, "a (red:1.3) dog") for clip in (carrying[1], studio.clip))
    assert torch.equal(ours[0][0], theirs[0][0])
    assert torch.equal(studio.ksampler(studio.model, ours, ours),
                       studio.ksampler(studio.model, theirs, theirs))


def test_unknown_placeholders_are_one_sentence(studio, carrying):
    with pytest.raises(ConceptError) as caught:
        stock(studio, carrying[1], "a photo of <rx>")
    assert "<rx>" in str(caught.value) and "did you mean <rex>" in str(caught.value)


@pytest.mark.parametrize("prompt",
                         ["a photo of <rex> on a beach", "<blueprint> of a car, <mimi> at night", LONG])
def test_every_site_reads_its_own_copy(studio, carrying, backbone, prompt):
    """The host's whole path, wrappers and patches, against core's backbone."""
    sigma = studio.model.model.model_sampling.sigmas[500]
    ours = predictions(carrying[0], stock(studio, carrying[1], prompt), sigma=sigma.item())[0]
    alpha = 1 / (1 + sigma.square())
    latents = noisy(studio.model) * alpha.sqrt()
    v = backbone.predict(latents, torch.tensor([500]), by_core(backbone, studio.bank, prompt))
    core = alpha.sqrt() * latents - (1 - alpha).sqrt() * v
    assert distance(ours, core) < 1e-4
    mean_only = predictions(studio.model, stock(studio, carrying[1], prompt), sigma=sigma.item())[0]
    assert distance(mean_only, core) > 1e-4


@pytest.mark.parametrize("negative", ["", "a blurry photo", "a bad photo of <mimi>", LONG])
@pytest.mark.parametrize("positive", ["<rex>", LONG])
def test_both_halves_share_a_batch_where_comfyuis_own_do(studio, carrying, positive, negative):
    clip, calls, theirs = carrying[1], [], []
    ours = [stock(studio, clip, text) for text in (positive, negative)]
    plain = [stock(studio, studio.clip, text.replace("<", "").replace(">", ""))
             for text in (positive, negative)]
    together = predictions(carrying[0], *ours, calls=calls)
    predictions(studio.model, *plain, calls=theirs)
    alone = [predictions(carrying[0], one)[0] for one in ours]
    assert calls == theirs == [2]
    assert all(distance(a, b) < 1e-4 for a, b in zip(together, alone, strict=True))


def test_combine(studio, carrying):
    ours = [stock(studio, carrying[1], text) for text in ("<rex>", "a red car")]
    both = studio.stock.ConditioningCombine().combine(*ours)[0]
    expected = sum(predictions(carrying[0], one)[0] for one in ours) / 2
    assert distance(predictions(carrying[0], both)[0], expected) < 1e-4


def test_concat_appends(studio, carrying):
    """The appended prompt keeps its mean copy, the first one all its layer copies."""
    ours = [stock(studio, carrying[1], text) for text in ("<rex>", "a red car")]
    joined = studio.stock.ConditioningConcat().concat(*ours)[0]
    copies = studio.bank.layout.copies
    calls, layers = [], torch.cat([layers_of(one).expand(-1, copies, -1, -1) for one in ours], 2)
    negative = stock(studio, carrying[1], "<mimi>")
    found, other = predictions(carrying[0], joined, negative, calls=calls)
    assert calls == [2] and distance(found, by_layers(studio, layers)) < 1e-4
    assert distance(other, predictions(carrying[0], negative)[0]) < 1e-4


def by_layers(studio, layers: torch.Tensor):
    """The denoised latents of a context `[1, L, N, D]`, by core."""
    from continual_concepts.core.comfy.backbone import ComfyBackbone
    from continual_concepts.core.model.context import Context

    backbone, sampling = ComfyBackbone(studio.model, studio.clip), studio.model.model.model_sampling
    sigma = torch.tensor(3.0)
    alpha = 1 / (1 + sigma.square())
    latents = noisy(studio.model) * alpha.sqrt()
    v = backbone.predict(latents, sampling.timestep(sigma).view(1).float(), Context(layers))
    return alpha.sqrt() * latents - (1 - alpha).sqrt() * v


def test_zero_out(studio, carrying):
    ours, plain = (stock(studio, clip, text)
                   for clip, text in ((carrying[1], "<rex>"), (studio.clip, "a dog")))
    zeros = [studio.stock.ConditioningZeroOut().zero_out(one)[0] for one in (ours, plain)]
    assert torch.equal(predictions(carrying[0], zeros[0])[0], predictions(studio.model, zeros[1])[0])


def test_zero_out_beside_a_concept(studio, carrying):
    positive = stock(studio, carrying[1], "<rex>")
    negative = studio.stock.ConditioningZeroOut().zero_out(positive)[0]
    calls = []
    together = predictions(carrying[0], positive, negative, calls=calls)
    alone = [predictions(carrying[0], one)[0] for one in (positive, negative)]
    assert calls == [2] and all(distance(a, b) < 1e-4 for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_average(studio, carrying, strength):
    """ComfyUI averages the mean over layer copies. At strength 1 the conditioning stays as it is."""
    one, other = (stock(studio, carrying[1], text) for text in ("<rex>", "a red car"))
    mixed = studio.stock.ConditioningAverage().addWeighted(one, other, strength)[0]
    found, first, second = (predictions(carrying[0], text)[0] for text in (mixed, one, other))
    if strength == 1.0:
        assert distance(found, first) < 1e-5
    else:
        whole, nearer = distance(first, second), min(distance(found, first), distance(found, second))
        assert 0.1 * whole < nearer < whole


def test_timestep_range(studio, carrying):
    """Two prompts, one for each half of the steps, as with stock conditionings."""
    node = studio.stock.ConditioningSetTimestepRange()
    first, second = (stock(studio, carrying[1], text) for text in ("<rex>", "<mimi>"))
    ranged = [*node.set_range(first, 0.0, 0.5)[0], *node.set_range(second, 0.5, 1.0)[0]]
    negative = stock(studio, carrying[1], "")
    model = carrying[0]
    whole = [studio.ksampler(model, one, negative, steps=4) for one in (first, second, ranged)]
    assert not torch.equal(whole[2], whole[0]) and not torch.equal(whole[2], whole[1])
    assert torch.equal(studio.ksampler(model, node.set_range(first, 0.0, 1.0)[0], negative),
                       studio.ksampler(model, first, negative))


def test_batches(studio, carrying):
    """A picture does not depend on its neighbours (the sampler's noise is drawn for the whole batch)."""
    positive, negative = (stock(studio, carrying[1], text) for text in ("<rex>", "a photo"))
    three = studio.ksampler(carrying[0], positive, negative, studio.latent(3))
    one = studio.ksampler(carrying[0], positive, negative, studio.latent(1))
    assert three.shape[0] == 3 and distance(three[:1], one) < 1e-4


def test_two_aggregations_in_a_row(studio):
    """The second adds to the first; its own prompts are encoded once, not twice."""
    from continual_concepts.core.bank.bank import ConceptBank

    banks = [ConceptBank(studio.bank.layout).add(studio.bank[name]) for name in ("rex", "mimi")]
    model, clip, _ = studio.aggregate("<rex>", banks[0])
    model, clip, _ = studio.aggregate("<mimi>", banks[1], model=model, clip=clip)
    both = studio.aggregate("<rex> <mimi>", studio.bank)
    for text in ("<rex> and <mimi>", "<mimi>", "<rex>", "a dog"):
        ours, theirs = (layers_of(stock(studio, one, text)) for one in (clip, both[1]))
        assert distance(ours.expand_as(theirs), theirs) < 1e-5
    prompts = [stock(studio, clip, text) for text in ("<rex> and <mimi>", "")]
    expected = studio.ksampler(both[0], *(stock(studio, both[1], text) for text in ("<rex> and <mimi>", "")))
    assert distance(studio.ksampler(model, *prompts), expected) < 1e-3


def test_a_second_aggregation_of_the_same_bank(studio):
    """The last one decides, for prompt-activated concepts as for word-bound ones."""
    model, clip, _ = studio.aggregate("<rex>", studio.bank, strength=0.5)
    model, clip, _ = studio.aggregate("<rex>", studio.bank, model=model, clip=clip)
    once = studio.aggregate("<rex>", studio.bank)
    results = [studio.ksampler(m, stock(studio, c, "<rex>"), stock(studio, c, ""))
               for m, c in ((model, clip), once[:2])]
    assert distance(*results) < 1e-3


@pytest.fixture
def lora(studio) -> dict:
    """A kohya file's contents, for one layer of the UNet and one of the text encoder."""
    g = torch.Generator().manual_seed(0)
    site = next(s for s in studio.bank.layout.sites
                if s.name == "down_blocks.1.attentions.0.transformer_blocks.0.attn2")
    text = studio.clip.cond_stage_model.clip_l.transformer.text_model.encoder.layers[0].mlp.fc1.weight
    state = {}
    for name, (a, b) in (("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k",
                          site.shape("to_k")),
                         ("lora_te_text_model_encoder_layers_0_mlp_fc1", text.shape)):
        state[f"{name}.lora_up.weight"] = torch.randn(a, 4, generator=g) * 0.3
        state[f"{name}.lora_down.weight"] = torch.randn(4, b, generator=g) * 0.3
        state[f"{name}.alpha"] = torch.tensor(4.0)
    return state


def test_loras_before_and_after(studio, lora, caplog):
    import comfy.sd

    before = comfy.sd.load_lora_for_models(studio.model, studio.clip, lora, 1.0, 1.0)
    assert "not loaded" not in caplog.text
    first = studio.aggregate("<rex>", studio.bank, model=before[0], clip=before[1])[:2]
    plain = studio.aggregate("<rex>", studio.bank)[:2]
    after = comfy.sd.load_lora_for_models(*plain, lora, 1.0, 1.0)
    assert "not loaded" not in caplog.text
    results = [studio.ksampler(m, stock(studio, c, "<rex>"), stock(studio, c, ""))
               for m, c in (first, after, plain)]
    assert distance(results[0], results[1]) < 1e-4 < distance(results[0], results[2])
    clips = [layers_of(stock(studio, c, "<rex>")) for _, c in (first, after, plain)]
    assert distance(clips[0], clips[1]) < 1e-5 < distance(clips[0], clips[2])


def test_clip_skip(studio, carrying, backbone):
    """CLIP Set Last Layer after the aggregation and before it: the same."""
    node = studio.stock.CLIPSetLastLayer()
    after = node.set_last_layer(carrying[1], -2)[0]
    before = studio.aggregate("a dog", studio.bank, clip=node.set_last_layer(studio.clip, -2)[0])[1]
    results = [layers_of(stock(studio, clip, "<rex>")) for clip in (after, before, carrying[1])]
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_an_aggregated_clip_can_be_learned_with(studio, own_folder):
    model, clip, _ = studio.aggregate("a dog", studio.bank)
    bank = studio.learn(model=model, clip=clip, bank=[studio.bank], steps=1)
    assert bank.names == ["rex", "mimi", "blueprint", "spot"]


def test_beginnings_of_rows_are_encoded_as_in_whole_rows(backbone):
    """The encoder's table of positions is restored, also after an error."""
    encoder = backbone.text[0]
    table = encoder.model.transformer.text_model.embeddings.position_embedding
    before = table.weight
    row = [encoder.start, *encoder.ids("a red dog in a meadow"), encoder.end]
    ids = torch.tensor([row + [encoder.pad] * (encoder.length - len(row))])
    nothing = torch.zeros(0, encoder.width)
    with torch.no_grad():
        whole, _ = encoder.encode(ids, torch.zeros_like(ids, dtype=torch.bool), nothing)
        for count in (1, 4, len(row)):
            short, _ = encoder.encode(ids[:, :count], torch.zeros(1, count, dtype=torch.bool), nothing)
            assert short.shape[1] == count and torch.allclose(short, whole[:, :count], atol=1e-5)
        with pytest.raises(StopIteration):      # a place for a learned vector, and no vector
            encoder.encode(ids[:, :3], torch.ones(1, 3, dtype=torch.bool), nothing)
    assert table.weight is before


def test_rows_of_nouns_are_counted_behind_what_the_encoder_cuts_off(comfyui):
    """A template's prefix has no rows; a picture in front of the text has several for its one token."""
    from continual_concepts.core.comfy.noun_clip import NounId, noun_rows
    from continual_concepts.core.comfy.text import cut_in_front

    row = [(1, 1.0), (NounId.of(2, "rex"), 1.0), (3, 1.0), (NounId.of(4, "rex"), 1.0),
           (NounId.of(5, "tom"), 1.0), (6, 1.0)]
    for name, rows, cut in (("qwen3vl_4b", 6, 0), ("qwen3vl_4b", 4, 2), ("qwen3vl_4b", 9, -3),
                            ("qwen3_8b", 6, 0), ("t5xxl", 4, 0)):
        assert cut_in_front({name: [row]}, torch.zeros(1, rows, 8)) == cut
    assert cut_in_front({"qwen3_06b": [row[:2]], "t5xxl": [row]}, torch.zeros(1, 2, 8)) == 0      # Anima
    assert noun_rows(row, 0) == {"rex": (1, 3), "tom": (4,)}
    assert noun_rows(row, 2) == {"rex": (1,), "tom": (2,)}
    assert noun_rows(row, -3) == {"rex": (4, 6), "tom": (7,)}
