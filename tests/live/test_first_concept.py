"""A newcomer's way: photos in a folder, a template, a name, Run, a new prompt. Takes the pictures of
docs/first-concept.

The embedded base stands for the checkpoint that a person would have. The preset has settings for it.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from PIL import Image

from continual_concepts.core.demo.bases import picture_size

pytestmark = pytest.mark.slow

NAME = "02 Learn a first concept"
WHO = "mimi"
PROMPTS = ("a photo of <mimi> on a beach", "a photo of <mimi> in the snow")
SMALL = """prompt => {
    const of = type => app.graph._nodes.find(node => node.type === type);
    const set = (type, values) => Object.entries(values).forEach(([name, value]) => {
        of(type).widgets.find(widget => widget.name === name).value = value;
    });
    const loader = of('CheckpointLoaderSimple'), base = LiteGraph.createNode('ConceptDemoBase');
    base.pos = [loader.pos[0], loader.pos[1]];
    app.graph.add(base);
    loader.outputs.forEach((output, slot) => (output.links || []).slice().forEach(id => {
        const link = app.graph.links[id];
        base.connect(slot, app.graph.getNodeById(link.target_id), link.target_slot);
    }));
    app.graph.remove(loader);
    const learner = of('ConceptLearner');
    base.connect(3, learner, learner.inputs.findIndex(input => input.name === 'clip_vision'));
    set('ConceptPhotosLoad', {folder: 'mimi'});
    set('ConceptLearner', {name: 'mimi', class_noun: 'cat', preview_every: 25});
    set('ElasticWeightAggregate', {prompt});
    set('EmptyLatentImage', {width: 128, height: 128, batch_size: 4});
    set('KSampler', {cfg: 3, steps: 16, sampler_name: 'euler', scheduler: 'normal'});
    const saver = of('SaveImage'), larger = LiteGraph.createNode('ImageScale'), decoder = of('VAEDecode');
    saver.title = 'Picture of <mimi>';
    larger.pos = [decoder.pos[0] + 400, decoder.pos[1]];
    app.graph.add(larger);
    set('ImageScale', {upscale_method: 'lanczos', width: 256, height: 256});
    decoder.connect(0, larger, 0);
    larger.connect(0, saver, 0);
}"""
SET = """([type, name, value]) => {
    const found = app.graph._nodes.find(node => node.type === type);
    found.widgets.find(widget => widget.name === name).value = value;
}"""
SHOW = """types => {
    const nodes = app.graph._nodes.filter(node => types.includes(node.type) || types.includes(node.title));
    const boxes = nodes.map(
        node => [node.pos[0], node.pos[1] - 30, node.pos[0] + node.size[0], node.pos[1] + node.size[1]]);
    const edge = (i, pick) => pick(...boxes.map(box => box[i]));
    const [left, top] = [edge(0, Math.min), edge(1, Math.min)];
    const [right, bottom] = [edge(2, Math.max), edge(3, Math.max)];
    const scale = Math.min(1280 / (right - left), 740 / (bottom - top), 1.3);
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [(70 + (1310 - scale * (right - left)) / 2) / scale - left, 125 / scale - top];
    app.graph.setDirtyCanvas(true, true);
}"""
SEEN = """() => {
    window.seen = {previews: 0, lines: []};
    for (const name of ['b_preview', 'b_preview_with_metadata'])
        app.api.addEventListener(name, () => seen.previews++);
    app.api.addEventListener('progress_text', event => seen.lines.push(event.detail.text));
}"""


@pytest.fixture(scope="module")
def steps(script):
    """The module of page tests: how templates are opened."""
    return script(Path(__file__).with_name("test_page.py"))


@pytest.fixture
def page(open_page):
    page = open_page(1400, 880)
    # small writing stays writing
    page.evaluate("app.extensionManager.setting.set('LiteGraph.Canvas.MinFontSizeForLOD', 0)")
    return page


def put_photos(folder: Path) -> None:
    from continual_concepts.core.demo import scenes

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for number, (picture, _) in enumerate(scenes.CONCEPTS[WHO].pictures(5, 7, picture_size())):
        Image.fromarray(picture).save(folder / f"{number + 1}.png")


def press_run(page, server) -> str:
    """Returns the run's id, which the page has just sent."""
    before = set(server.call("/history")) | {one[1] for kind in ("queue_running", "queue_pending")
                                             for one in server.call("/queue")[kind]}
    page.evaluate("app.extensionManager.command.execute('Comfy.QueuePrompt')")
    for _ in range(200):
        page.wait_for_timeout(100)
        queue = server.call("/queue")
        now = set(server.call("/history")) | {one[1] for kind in ("queue_running", "queue_pending")
                                              for one in queue[kind]}
        if now - before:
            return (now - before).pop()
    raise AssertionError(f"nothing was queued: {server.log[-1000:]}")


def shoot(page, folder: Path, number: int, *types: str) -> None:
    if types:
        page.evaluate(SHOW, list(types))
    page.wait_for_timeout(1200)
    page.screenshot(path=str(folder / f"{number}.png"))


def test_a_newcomers_first_concept(page, server, steps, tmp_path):
    began, spent = time.monotonic(), []

    def done(what: str) -> None:
        spent.append(f"{what}: {time.monotonic() - began:.0f} s")

    put_photos(server.base / "input" / WHO)
    steps.browse(page)
    page.wait_for_timeout(1500)
    shoot(page, tmp_path, 1)
    steps.open_template(page, NAME)
    page.evaluate(SMALL, PROMPTS[0])
    done("template opened")
    shoot(page, tmp_path, 2, "ConceptPhotosLoad", "ConceptDemoBase", "ConceptLearner")
    page.evaluate(SEEN)
    run = press_run(page, server)
    page.wait_for_function("seen.previews >= 3 && seen.lines.length >= 12", timeout=300_000)
    shoot(page, tmp_path, 3, "ConceptPhotosLoad", "ConceptDemoBase", "ConceptLearner", "ConceptBankSave")
    entry = server.wait(run, 600)
    assert entry["status"]["status_str"] == "success", server.error_of(entry)
    done("learned, saved, drawn")
    assert (server.base / "output" / "concept_banks" / "my-concepts.safetensors").is_file()
    assert len(server.pictures(entry)) == 4
    page.wait_for_timeout(500)
    told = page.evaluate("seen.lines")      # what stands below the nodes
    assert any(line.startswith("5 photos") for line in told), told[-5:]
    assert "my-concepts.safetensors: &lt;mimi&gt;" in told, told[-5:]
    assert page.get_by_text("my-concepts.safetensors: <mimi>").count() == 1
    page.wait_for_timeout(2500)
    shoot(page, tmp_path, 4, "ConceptBankSave", "ConceptBankInspect", "Loss", "While it was learning")
    page.evaluate(SET, ["ElasticWeightAggregate", "prompt", PROMPTS[1]])
    entry = server.wait(press_run(page, server), 300)
    assert entry["status"]["status_str"] == "success", server.error_of(entry)
    cached = {node for kind, message in entry["status"]["messages"] if kind == "execution_cached"
              for node in message["nodes"]}
    learner = page.evaluate("app.graph._nodes.find(node => node.type === 'ConceptLearner').id")
    assert str(learner) in cached      # what is learned is not learned again for another prompt
    done("a new prompt drawn")
    page.wait_for_timeout(2500)
    shoot(page, tmp_path, 5, "ElasticWeightAggregate", "KSampler", "Picture of <mimi>", "Negative prompt")
    assert not page.errors
    print(f"screenshots: {tmp_path}", *spent, sep="\n")
