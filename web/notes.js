/**
 * Shows what a PuLID node said in its last run below its widgets: its notes, or why it failed.
 *
 * ComfyUI sends `ui.text` of a node with its other outputs, but its editor draws it for few nodes of its own only, and
 * takes the text of progress away when a job ends. The panel is a DOM widget, so both renderers show it: the canvas and
 * Nodes 2.0. Nothing of it is saved in a workflow or sent with a prompt.
 */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const WIDGET = "pulid_notes";
const PROGRESS = "$$node-text-preview"; // ComfyUI's own widget for the text of progress
const FOLDED_LINES = 5;
const OPEN_LINES = 14;
const LINE = 16; // pixels
const BAR = 26; // the row of buttons
const LETTER = 6.1; // mean width of one in pixels
const DOM_MARGIN = 20; // that the canvas keeps above and below such a widget, together
const MARGIN = 30; // of the node and the panel, both sides

const PACK = decodeURIComponent(new URL(import.meta.url).pathname.split("/").at(-2));

/** Style in one place; colours are the editor's own, so that every theme fits. */
const STYLE = `
.pulid-notes { display: flex; flex-direction: column; box-sizing: border-box; overflow: hidden; font: 12px/16px sans-serif;
  border-radius: 6px; border-left: 3px solid #6b9bd1; background: var(--comfy-input-bg, #222); color: var(--input-text, #ddd); }
.pulid-notes.failed { border-left-color: #e0605e; }
.pulid-notes-text { flex: 1 1 auto; min-height: 0; padding: 5px 8px 0; overflow: hidden; white-space: pre-wrap;
  overflow-wrap: anywhere; user-select: text; cursor: text; }
.pulid-notes.open .pulid-notes-text { overflow-y: auto; }
.pulid-notes-bar { flex: 0 0 22px; display: flex; justify-content: flex-end; gap: 10px; padding: 0 8px 2px; }
.pulid-notes-bar button { all: unset; cursor: pointer; font-size: 11px; opacity: 0.7; }
.pulid-notes-bar button:hover, .pulid-notes-bar button:focus-visible { opacity: 1; text-decoration: underline; }
`;

/** The panel of one node. */
class Panel {
  constructor(node) {
    this.node = node;
    this.element = document.createElement("div");
    this.element.className = "pulid-notes";
    this.text = this.element.appendChild(document.createElement("div"));
    this.text.className = "pulid-notes-text";
    const bar = this.element.appendChild(document.createElement("div"));
    bar.className = "pulid-notes-bar";
    this.fold = button(bar, "", () => this.setOpen(!this.open));
    this.copy = button(bar, "Copy", () => this.toClipboard());
    for (const event of ["pointerdown", "wheel", "copy"]) {
      this.element.addEventListener(event, (it) => it.stopPropagation()); // select and scroll here, not on the canvas
    }
    this.widget = node.addDOMWidget(WIDGET, "pulid_notes", this.element, {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: () => this.height + DOM_MARGIN,
      getMaxHeight: () => this.height + DOM_MARGIN,
    });
    this.widget.serialize = false;
  }

  show(text, failed) {
    this.text.textContent = text;
    this.element.classList.toggle("failed", failed);
    this.setOpen(failed);
  }

  remove() {
    if (this.node.removeWidget) this.node.removeWidget(this.widget);
    else {
      this.widget.onRemove?.(); // editors before 1.35
      this.node.widgets.splice(this.node.widgets.indexOf(this.widget), 1);
    }
    panels.delete(this.node);
    failures.delete(this.node);
  }

  setOpen(open) {
    const lines = this.lines();
    this.open = open;
    this.height = Math.min(lines, open ? OPEN_LINES : FOLDED_LINES) * LINE + BAR;
    this.element.classList.toggle("open", open);
    this.element.style.minHeight = this.element.style.maxHeight = `${this.height}px`; // Nodes 2.0 asks the element
    this.fold.textContent = open ? "Less" : "More";
    this.fold.style.display = lines > FOLDED_LINES ? "" : "none";
    fit(this.node);
  }

  /** How many lines the text takes at the node's width, as far as that can be told without drawing it. */
  lines() {
    const letters = Math.max(20, (this.node.size[0] - MARGIN) / LETTER);
    return this.text.textContent.split("\n").reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / letters)), 0);
  }

  async toClipboard() {
    await navigator.clipboard.writeText(this.text.textContent);
    this.copy.textContent = "Copied";
    setTimeout(() => (this.copy.textContent = "Copy"), 1500);
  }
}

function button(parent, text, act) {
  const made = parent.appendChild(document.createElement("button"));
  made.type = "button";
  made.textContent = text;
  made.addEventListener("click", act);
  return made;
}

/** Make the node as tall as its parts need, and no smaller than it is; the text of progress is about to go. */
function fit(node) {
  const widgets = node.widgets;
  node.widgets = widgets.filter((widget) => widget.name !== PROGRESS);
  const [width, height] = node.computeSize();
  node.widgets = widgets;
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  app.canvas?.setDirty(true, true);
}

const panels = new WeakMap();
const failures = new Set(); // nodes whose panel says why they failed

function show(node, text, failed = false) {
  if (!text?.length) return;
  failures[failed ? "add" : "delete"](node);
  if (!panels.has(node)) panels.set(node, new Panel(node));
  panels.get(node).show([].concat(text).join("\n"), failed);
}

const root = () => app.rootGraph ?? app.graph;

const isOurs = (node) => node?.constructor?.nodeData?.python_module === `custom_nodes.${PACK}`;

/** The node of an execution id, such as "12" or, within the subgraph of node 12, "12:3". */
function executed(id) {
  return String(id)
    .split(":")
    .reduce((found, part) => (found?.subgraph ?? found?.graph ?? found)?.getNodeById?.(Number(part)), { graph: root() });
}

/** The node of a locator, such as "12" or, in a subgraph, "<its uuid>:12". */
function located(locator) {
  const parts = locator.split(":");
  const graph = parts.length > 1 ? root().subgraphs?.get(parts[0]) : root();
  return graph?.getNodeById(Number(parts.at(-1)));
}

app.registerExtension({
  name: "PuLID.Notes",

  setup() {
    document.head.appendChild(document.createElement("style")).textContent = STYLE;
    api.addEventListener("execution_start", () => failures.forEach((node) => panels.get(node)?.remove()));
    api.addEventListener("execution_error", ({ detail }) => {
      const node = executed(detail.node_id);
      if (isOurs(node)) show(node, detail.exception_message.trim(), true);
    });
  },

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.python_module !== `custom_nodes.${PACK}`) return;
    const { onExecuted } = nodeType.prototype;
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      show(this, output?.text);
    };
  },

  /** A run of before is shown again: another tab of the editor, or an entry of its history. */
  onNodeOutputsUpdated(outputs) {
    for (const [locator, output] of Object.entries(outputs)) {
      const node = located(locator);
      if (isOurs(node)) show(node, output?.text);
    }
  },
});
