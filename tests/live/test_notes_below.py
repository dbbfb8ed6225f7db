"""What the page shows of the notes below a node. It reads them as HTML."""

from __future__ import annotations

import html

import pytest

pytestmark = pytest.mark.slow

RENDER = "on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
TELL = """text => {
    app.graph.clear();
    const node = LiteGraph.createNode('ConceptBankSave');
    app.graph.add(node);
    node.pos = [400, 200];
    app.api.dispatchCustomEvent('progress_text', {nodeId: String(node.id), text});
}"""


@pytest.fixture(scope="module")
def tab(open_page):
    return open_page()


@pytest.mark.parametrize("renderer", ["classic", "vue"])
def test_names_in_notes_are_shown(tab, renderer):
    """As `progress.say` sends them."""
    tab.evaluate(RENDER, renderer == "vue")
    tab.evaluate(TELL, html.escape("bank: <rex> & <mimi>\nsecond line", quote=False))
    tab.wait_for_timeout(1500)
    shown = tab.get_by_text("bank: <rex> & <mimi>")
    assert shown.count() == 1 and "second line" in shown.inner_text() and not tab.errors
